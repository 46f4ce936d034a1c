"""The commands `plan` and `data`."""

import json
import re
from pathlib import Path

import pytest
from command_line import dpost_lite

from dpost_lite.recipe_files import load_recipe

pytestmark = pytest.mark.usefixtures("cwd")


# plan


def test_plan_names_base_licence_sizes_choices_and_the_next_command() -> None:
    result = dpost_lite("plan", "--gpu-mem", "24GB")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Qwen/Qwen3-8B-Base: 8.19 B parameters, 16.4 GB in 16 bit, Apache-2.0\n")
    assert all(len(line) <= 100 for line in result.stdout.splitlines())
    peak = next(line.split() for line in result.stdout.splitlines() if line.startswith("GPU peak"))
    assert all(0 < float(size) < 22.4 for size in peak[2:])
    assert len(peak) == 6
    assert "sampling: weights merged, rows " in result.stdout
    assert "(RTX 4090, not measured here)" in result.stdout
    hours = next(line.split() for line in result.stdout.splitlines() if line.startswith("hours"))
    assert all(float(number) > 0 for number in hours[1:])
    assert result.stdout.rstrip().endswith("next: dpost-lite run --gpu-mem 24GB --model Qwen/Qwen3-8B-Base")


def test_the_next_command_repeats_what_was_asked() -> None:
    asked = ("--gpu-mem", "24GB", "--recipe", "paper-llama3-8b-24gb", "--limit", "64", "sft.max_length=512")
    result = dpost_lite("plan", *asked)
    model = "--model meta-llama/Meta-Llama-3-8B"
    given = f"--gpu-mem 24GB --recipe paper-llama3-8b-24gb {model} --limit 64 sft.max_length=512"
    assert result.stdout.rstrip().endswith(f"next: dpost-lite run {given}")


def test_plan_takes_a_folder_and_recipe_keys(bare_model: Path) -> None:
    plain = dpost_lite("plan", "--gpu-mem", "2GB", "--model", bare_model)
    longer = dpost_lite("plan", "--gpu-mem", "2GB", "--model", bare_model, "sampling.max_new_tokens=900")
    assert plain.exit_code == longer.exit_code == 0, plain.output + longer.output
    assert "longest 513" in plain.stdout
    assert "longest 1113" in longer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu-mem", "lots"), "'lots' is no size; give one like 24GB"),
        (("--gpu-mem", "8GB", "--model", "Qwen/Qwen3-14B-Base"), "Qwen/Qwen3-4B-Base fits"),
        (("--gpu-mem", "1GB"), "needs at least"),
        (("--gpu-mem", "8GB", "sft.maxlength=3"), "did you mean 'max_length'?"),
        (("--gpu-mem", "8GB", "--model", "nowhere"), "there is no folder nowhere"),
    ],
)
def test_plan_refuses_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    result = dpost_lite("plan", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_size_without_a_gpu_is_refused_before_a_folder_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for size in ("24GB", "auto"):
        result = dpost_lite("run", "--gpu-mem", size)
        assert result.exit_code == 2
        assert "dpost-lite plan --gpu-mem 24GB" in result.stderr
    assert not Path("runs").exists()
    assert "no CUDA GPU" in dpost_lite("plan").stderr


def test_a_cpu_is_planned_with_the_rehearsal_and_named_in_the_next_command() -> None:
    result = dpost_lite("plan", "--gpu-mem", "cpu")
    assert result.exit_code == 0, result.output
    assert "RAM peak" in result.stdout
    assert "GPU" not in result.stdout
    assert re.search(r"total time about \d+ minutes", result.stdout)
    assert result.stdout.rstrip().endswith("next: dpost-lite run --gpu-mem cpu --model smollm2-135m-instruct")


# data


def test_data_shows_counts_refused_rows_and_exact_samples(cwd: Path, bare_model: Path) -> None:
    rows = [
        {"question": "What is [b]2+2[/b]?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        {"question": "And 3?", "answer": 3},
    ]
    rows += [{"question": f"Bad {k}", "answer": "none"} for k in range(12)]
    (cwd / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = dpost_lite("data", "mine.jsonl", "--model", bare_model)
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert "mine.jsonl: read as question/answer" in out
    assert "2 problems, 1 of them labelled" in out
    assert "12 rows refused" in out
    assert out.count("mine.jsonl:") == 1 + 10
    assert "and 2 more" in out
    assert "[b]2+2[/b]?" in out
    assert "2+2=<<2+2=4>>4\n#### 4</s>" in out  # the stop token is what is trained on, so it is seen
    assert "no worked solution, answer 3" in out


def test_data_of_the_built_in_problems_is_what_a_bare_run_trains_on(bare_model: Path) -> None:
    data = load_recipe("rehearsal")
    out = dpost_lite("data", "synthetic", "--model", bare_model).stdout
    assert f"{data.synthetic.num_train:,} problems" in out
    assert out.count(" prompt tokens") == 3
