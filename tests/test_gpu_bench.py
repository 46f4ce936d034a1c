"""bench/gpu.py on a CPU: every part on a tiny model, and what is concluded from them."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dpost_lite.errors import RecipeError, RunError
from dpost_lite.planner.device import GIB, Device, card, parse_memory
from dpost_lite.planner.plan import fit_stage, make_plans
from dpost_lite.planner.workload import GSM8K
from dpost_lite.recipe_files import load_recipe
from dpost_lite.runs.folder import WorkResult

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu
import gpu_parts
from gpu_parts import FULL, TINY, Calculations, Part

BENCH = Path(gpu.__file__).parent
CPU = Device("cpu", 16e9, 4, 1e11, 1e10, "of no importance")
TRAINED = [f"train/tiny/{entrant}/{kind}" for entrant in ("qlora", "16bit", "full") for kind in ("sft", "dpo")]
OURS = [f"sample/tiny/{name}" for name in ("merged/ours", "merged/ours-off", "4bit/ours", "merged/ours-products")]
OTHERS = [f"sample/tiny/merged/{entrant}" for entrant in ("papers", "continuous", "generate")]


def command(path: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(BENCH / "gpu.py"), "--tiny", "--device", "cpu", "--save", str(path)]
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result's path, what the command printed, and the result."""
    path = tmp_path_factory.mktemp("gpu") / "result.json"
    done = command(path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return path, done.stdout, json.loads(path.read_text())


@pytest.mark.slow  # for the demo model's tokenizer
class TestWholeRun:
    def test_all_parts_are_measured_but_what_is_not_installed(self, whole):
        _, out, record = whole
        done = [name for name, part in record["parts"].items() if part["status"] == "done"]
        assert sorted(done) == sorted(["machine", *TRAINED, *OURS, *OTHERS])
        others = {name: part["why"] for name, part in record["parts"].items() if name not in done}
        assert others == dict.fromkeys(
            ["train/tiny/unsloth/sft", "train/tiny/unsloth/dpo", "sample/tiny/merged/vllm"], "not installed"
        )
        assert json.loads(out.splitlines()[-1]) == record

    def test_machine(self, whole):
        found = whole[2]["parts"]["machine"]
        assert found["machine"]["torch"]
        for rates in found["rates"].values():
            assert 0.1 < rates["bandwidth_gb_s"] < 1000
            assert 1 < rates["matrix_gflop_s"] < 100_000

    @pytest.mark.parametrize("name", TRAINED)
    def test_training(self, whole, name):
        part = whole[2]["parts"][name]
        rows = 4 if name.endswith("sft") else 8  # two micro-batches of 2; a pair has two sides
        assert part["tokens"] == rows * 24
        assert part["tokens_per_s"] == pytest.approx(part["tokens"] / part["seconds"])
        assert 0 < part["seconds"] < part["wall_s"]
        at_random = math.log(20_480) if name.endswith("sft") else math.log(2)
        assert part["loss"] == pytest.approx(at_random, rel=0.05)
        assert part["planned"]["micro_batch"] == 2
        assert 0.1 < part["resident_gib"] < 4

    @pytest.mark.parametrize("name", [*OURS, *OTHERS])
    def test_sampling_counts_the_lengths_that_were_drawn(self, whole, name):
        part = whole[2]["parts"][name]
        prompts = 4 if name in OTHERS else 16  # twice as many rationales as rows
        samples = 1 if name.endswith("generate") else 2
        dice, number = random.Random(1), 0
        for _ in range(prompts):
            number += samples * max(1, round(min(300, max(31, dice.lognormvariate(4.745, 0.417))) / 8))
        assert part["rationales"] == samples * prompts
        assert part["tokens"] == number
        assert part["tokens_per_s"] == pytest.approx(number / part["seconds"])
        assert part["rationales_per_s"] == pytest.approx(samples * prompts / part["seconds"])
        if name.endswith(("/ours", "/ours-products")):
            assert 0.12 < part["forced"] < 0.20
        else:
            assert part["forced"] == 0
        if name in OURS:
            assert part["rows"] == 16
            assert 0.4 < part["occupancy"] <= 1
            without_forced = part["tokens"] * (1 - part["forced"]) / 16
            assert part["steps"] + 1 >= without_forced - 80 / 16  # the prefill chooses each rationale's first token

    def test_the_bandwidth_bound(self, whole):
        record = whole[2]
        part, bound = record["parts"]["sample/tiny/merged/ours"], record["bounds"]["sample/tiny/merged/ours"]
        number_bytes = record["device"]["number_bytes"]
        linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
        read = linear + 20_480 * 64 + 5 * 64  # the head, not the embedding
        rows = part["occupancy"] * 16
        cache = 2 * 2 * 32 * rows * (part["prompt_tokens"] / 2 + part["tokens_per_rationale"] / 2)
        dtype = "bfloat16" if number_bytes == 2 else "float32"
        bandwidth = record["parts"]["machine"]["rates"][dtype]["bandwidth_gb_s"] * 1e9
        at_the_bound = part["steps"] * (read + cache) * number_bytes / bandwidth
        assert bound["bandwidth_reached"] == pytest.approx(at_the_bound / part["seconds"], rel=1e-6)
        assert set(record["bounds"]) == {name for name in OURS if not name.endswith("-products")}

    def test_the_night_by_hand(self, whole):
        record = whole[2]
        parts, hours = record["parts"], record["night"]
        rate = {name: parts[name]["tokens_per_s"] for name in parts if "tokens_per_s" in parts[name]}
        sft = 2 * 24 * sum(7473 + 7473 * 10 * 0.35 * 0.5 * number for number in range(4))
        dpo = 3 * 2 * 24 * 400  # 100 steps of 4
        drawn = 3 * 7473 * (5 + 10) * 16 + 4 * 1319 * 16 + 1319 * 38 * 0.95
        seconds = {
            "sft": sft / rate["train/tiny/qlora/sft"] + 4 * 8,
            "dpo": dpo / rate["train/tiny/qlora/dpo"] + 3 * 8,
            "sampling": drawn / rate["sample/tiny/merged/ours"] + 11 * 8,
        }
        for kind, expected in seconds.items():
            assert hours["stages"][kind]["measured_h"] == pytest.approx(expected / 3600), kind
        export = hours["stages"]["merge, export"]
        assert export["measured_h"] == export["planned_h"]
        assert hours["measured_h"] == pytest.approx(sum(seconds.values()) / 3600 + export["planned_h"])
        assert hours["planned_h"] == pytest.approx(sum(stage["planned_h"] for stage in hours["stages"].values()))

    def test_targets_name_what_was_measured(self, whole):
        _, out, record = whole
        verdicts = {target["claim"]: target["verdict"] for target in record["targets"]}
        assert len(verdicts) == 8
        assert verdicts.pop("training's memory within 15 % of the plan") == "not measured"  # on a CPU
        assert set(verdicts.values()) <= {"holds", "missed"}
        assert "no verdict on anything but this command" in out
        against = next(target for target in record["targets"] if "papers" in target["claim"])
        rate = {name: record["parts"][f"sample/tiny/merged/{name}"]["tokens_per_s"] for name in ("ours", "papers")}
        assert against["figure"].startswith(f"{rate['ours'] / rate['papers']:.2f} ")

    def test_a_second_run_repeats_nothing(self, whole, tmp_path):
        path, _, record = whole
        copy = tmp_path / "copy.json"
        copy.write_text(path.read_text())
        again = command(copy)
        assert again.stdout.startswith("0 parts to measure"), again.stdout + again.stderr
        assert again.stdout.count("there already") == 1 + len(TRAINED + OURS + OTHERS)
        assert json.loads(copy.read_text())["parts"] == record["parts"]
        assert json.loads(copy.read_text())["targets"] == record["targets"]


@dataclass(frozen=True)
class Does:
    """A task for the child."""

    what: str

    def run(self, out, progress):
        if self.what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "fails":
            raise ValueError("the kernel\nis not there")
        if self.what == "hangs":
            time.sleep(60)
        return {"tokens_per_s": 7.0}


def measured(parts: list[Part], tmp_path: Path, *, seconds: float = 600, record=None):
    record = record or {"parts": {}}
    path = tmp_path / "result.json"
    deadline = time.monotonic() + seconds
    gpu.run_parts(parts, record, path, CPU, deadline, TINY, tmp_path)
    assert json.loads(path.read_text()) == record
    return record["parts"]


def test_a_part_that_dies_is_recorded_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "AT_LEAST_S", 4)
    names = ["is killed", "fails", "hangs", "works"]
    found = measured([Part(name, Does(name), 0.1) for name in names], tmp_path)
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(names[:3], "failed") | {
        "works": "done"
    }
    assert "memory runs out" in found["is killed"]["why"]
    assert found["fails"]["why"].endswith("is not there")
    assert found["hangs"]["why"] == "the process was stopped after 4 s"
    assert found["works"]["tokens_per_s"] == 7
    assert all("\n" not in part.get("why", "") for part in found.values())
    record = {"parts": found}
    parts = [Part(name, Does("works"), 0.1) for name in names]
    gpu.forget(record, [], parts)
    assert measured(parts, tmp_path, record=record)["fails"]["status"] == "failed"
    assert "failed before; --again repeats it" in capsys.readouterr().out
    gpu.forget(record, ["fails"], parts)
    assert {name: part["status"] for name, part in measured(parts, tmp_path, record=record).items()} == {
        "is killed": "failed", "fails": "done", "hangs": "failed", "works": "done",
    }  # fmt: skip


def test_what_does_not_fit_into_the_time_is_skipped_and_tried_by_the_next_call(tmp_path):
    parts = [Part("first", Does("works"), 1), Part("long", Does("works"), 1000), Part("last", Does("works"), 2)]
    found = measured(parts, tmp_path, seconds=60)
    assert [part["status"] for part in found.values()] == ["done", "skipped", "done"]
    assert found["long"]["why"].startswith("planned at 1000 s, and ")
    record = {"parts": found}
    gpu.forget(record, [], parts)
    assert list(record["parts"]) == ["first", "last"]


def test_a_part_is_stopped_when_the_time_is_over(tmp_path):
    found = measured([Part("slow", Does("hangs"), 0.1), Part("late", Does("works"), 0.1)], tmp_path, seconds=2)
    assert found["slow"] == {"status": "skipped", "why": "stopped, as --minutes were over"}
    assert found["late"]["status"] == "skipped"


def full_parts(device: Device) -> list[Part]:
    return gpu_parts.all_parts(FULL, device, {name: Path(name) for name in FULL.shapes})


def test_parts_come_in_order_of_value():
    names = [part.name for part in full_parts(card(parse_memory("24GB")))]
    assert names[0] == "machine"
    assert len(set(names)) == len(names)
    kinds = [
        "slow" if name.split("/")[-1] in ("vllm", "continuous", "papers", "generate") else "ours" for name in names
    ]
    assert kinds == sorted(kinds)
    assert names[1:3] == ["train/llama-3.1-8b/qlora/sft", "train/llama-3.1-8b/qlora/dpo"]


def test_the_default_takes_less_than_25_minutes_on_a_24_gb_card():
    device = card(parse_memory("24GB"))
    parts = [part for part in full_parts(device) if not part.missing]
    making = len(FULL.shapes) * gpu_parts.weights_seconds(device)
    assert 15 * 60 < sum(part.seconds for part in parts) + making < 25 * 60
    assert {name.missing[:12] for name in full_parts(device) if "/full/" in name.name} == {"does not fit"}
    for part in parts:
        assert part.planned.get("gib", 0) < 24e9 / 2**30, part.name


def test_a_stage_by_itself_is_planned_as_in_the_whole_plan():
    recipe, device, shape = load_recipe(None), card(parse_memory("24GB")), FULL.shapes["llama-3.1-8b"]
    (plan,) = make_plans([(recipe, GSM8K)], shape, device)
    for stage in plan.stages[:3]:
        alone = fit_stage(stage.name, (recipe, GSM8K), shape, device)
        assert (alone.choices, alone.parts) == (stage.choices, stage.parts)
    in_4_bit = fit_stage("sampling", (recipe, GSM8K), shape, device, weights="quantized")
    assert in_4_bit.choices["rows"] > plan.stages[1].choices["rows"]


def test_lengths_are_those_of_gsm8k():
    prompts = gpu_parts.lengths(gpu_parts.PROMPT_TOKENS, 7473, 1, seed=0)
    answers = gpu_parts.lengths(gpu_parts.ANSWER_TOKENS, 7473, 1, seed=1)
    assert sum(prompts) / 7473 == pytest.approx(66.0, rel=0.02)  # counted with SmolLM2's tokenizer
    assert sum(answers) / 7473 == pytest.approx(125.6, rel=0.02)
    assert sorted(answers)[7473 // 2] == pytest.approx(114, rel=0.03)
    assert sorted(answers)[7473 * 9 // 10] == pytest.approx(200, rel=0.04)
    assert gpu_parts.lengths(gpu_parts.ANSWER_TOKENS, 32, 1, seed=1) == answers[:32]
    made = gpu_parts.problems(32, 1)
    assert sorted(made.values()) == sorted(answers[:32])


def test_the_writer_inserts_the_calculators_share():
    writer, tokens, inserted = Calculations(), 0, 0
    for _ in range(200):
        row, length = writer.row(), 0
        while length < 126:
            reply = row.push(5) or [5]
            length += len(reply)
            inserted += len(reply) - 1
        tokens += length
    assert inserted / tokens == pytest.approx(0.16, abs=0.01)


class TestVllm:
    """A stand-in with vLLM's signatures."""

    @pytest.fixture
    def made(self, monkeypatch):
        made = SimpleNamespace(options={}, asked=[])

        class SamplingParams:
            def __init__(
                self, n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=1.0,
                top_p=1.0, top_k=0, min_p=0.0, seed=None, stop=None, stop_token_ids=None, ignore_eos=False,
                max_tokens=16, min_tokens=0, logprobs=None, prompt_logprobs=None, detokenize=True,
            ):  # fmt: skip
                self.n, self.max_tokens, self.ignore_eos, self.detokenize = n, max_tokens, ignore_eos, detokenize

        class LLM:
            def __init__(
                self, model, *, tokenizer=None, tokenizer_mode="auto", skip_tokenizer_init=False,
                trust_remote_code=False, tensor_parallel_size=1, dtype="auto", quantization=None, seed=0,
                gpu_memory_utilization=0.9, enforce_eager=False, **engine_options,
            ):  # fmt: skip
                known = {"load_format", "max_model_len", "max_num_seqs", "enable_prefix_caching"}
                assert engine_options.keys() <= known
                made.options = {"model": model, "share": gpu_memory_utilization, **engine_options}

            def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
                assert len(prompts) == len(sampling_params)
                made.asked += zip(prompts, sampling_params, strict=True)
                return [
                    SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * own.max_tokens) for _ in range(own.n)])
                    for own in sampling_params
                ]

        module = ModuleType("vllm")
        module.LLM, module.SamplingParams = LLM, SamplingParams
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        return made

    def test_each_request_has_its_length(self, made, monkeypatch):
        import sampler

        answers = gpu_parts.problems(12, 1)
        prompter = SimpleNamespace(stop_id=2)
        setting = sampler.Setting(
            None, prompter, list(answers), 10, 96, max(answers.values()), 0.7, lengths=answers, folder=Path("weights"),
            memory_share=0.3,
        )  # fmt: skip
        row = sampler.measure("vllm", setting, repeats=1)
        assert row["tokens"] == 10 * sum(answers.values())
        assert row["rationales"] == 120
        assert made.options["model"] == "weights"
        assert made.options["share"] == 0.3
        assert made.options["load_format"] == "safetensors"
        assert made.options["max_model_len"] >= max(len(prompt) + answer for prompt, answer in answers.items())
        for prompt, own in made.asked:
            assert own.max_tokens == answers[tuple(prompt["prompt_token_ids"])]
            assert (own.n, own.ignore_eos, own.detokenize) == (10, True, False)


def test_a_gpus_memory_is_what_was_reserved_and_cuda_itself(tmp_path, monkeypatch):
    result = WorkResult({"tokens_per_s": 5.0, "allocated_gib": 1.5}, 3 * GIB, 2 * GIB)
    monkeypatch.setattr(gpu, "in_child", lambda *_, **__: result)
    part = Part("train/a/qlora/sft", Does("works"), 1, {"gib": 2.5, "tokens_per_s": 4.0})
    found = gpu.measure(part, card(24e9), 60, TINY, tmp_path)
    assert (found["gib"], found["reserved_gib"], found["allocated_gib"]) == (2.6, 2, 1.5)
    assert gpu.as_text(found) == "5 tokens/s (planned 4), 2.60 GiB (planned 2.50), 0 s"


def test_what_pytorch_allocated_of_a_gpu_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * GIB)
    assert gpu_parts.Measured(Does("works")).run(tmp_path, lambda *_: None)["allocated_gib"] == 3


def test_continuous_batching_is_held_to_the_cap(monkeypatch):
    """Its cache takes a share of all that is free; under a cap of 30 % of 80 GiB with 16 in use, 8 are left."""
    import sampler

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 16 * GIB)
    continuous = sampler.Continuous.__new__(sampler.Continuous)
    continuous._setting = SimpleNamespace(memory_share=0.3)
    assert continuous._share_of_free() * (80 - 16) == pytest.approx(0.8 * 8)
    continuous._setting = SimpleNamespace(memory_share=None)
    assert continuous._share_of_free() is None


def test_a_gpu_that_has_less_than_the_cap_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_name", lambda: "NVIDIA GeForce RTX 4060")
    monkeypatch.setattr(gpu, "find_device", lambda size: card(24e9))
    assert gpu.device_name("cuda") == "nvidia-geforce-rtx-4060"
    with pytest.raises(RecipeError, match=r"--gpu-mem 24GB: this machine's GPU has less; give a smaller size, or auto"):
        gpu.open_record(tmp_path / "new.json", gpu.parse([]))
    measured_here = replace(card(24e9), rates_of="measured here", total_bytes=25e9)
    monkeypatch.setattr(gpu, "find_device", lambda size: measured_here)
    record = gpu.open_record(tmp_path / "new.json", gpu.parse([]))
    assert Device(**json.loads(json.dumps(record))["device"]) == measured_here


def test_unsloth_is_trained_where_it_is_installed_and_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: object())
    on_gpu = {part.name: part for part in full_parts(card(24e9))}
    part = on_gpu["train/llama-3.1-8b/unsloth/dpo"]
    assert (part.missing, part.first_import) == ("", "dpost_lite.models.unsloth_backend")
    assert on_gpu["train/llama-3.1-8b/qlora/dpo"].first_import is None
    assert on_gpu["sample/llama-3.1-8b/merged/vllm"].missing == ""
    assert {part.missing for part in full_parts(CPU) if "/unsloth/" in part.name} == {"needs a GPU"}


def test_targets():
    import gpu_targets

    done = {
        "train/a/qlora/sft": {
            "status": "done", "tokens_per_s": 131, "gib": 11.6, "planned": {"tokens_per_s": 100, "gib": 10}
        },
        "train/a/qlora/dpo": {
            "status": "done", "tokens_per_s": 90, "gib": 9, "planned": {"tokens_per_s": 100, "gib": 10}
        },
        "sample/a/merged/ours": {
            "status": "done", "tokens_per_s": 600, "rationales_per_s": 4.0,
            "planned": {"tokens_per_s": 500, "gib": 10},
        },
        "sample/a/merged/ours-off": {"status": "done", "tokens_per_s": 610, "rationales_per_s": 4.1},
        "sample/a/merged/ours-products": {"status": "done", "tokens_per_s": 480},
        "sample/a/merged/papers": {"status": "done", "tokens_per_s": 100},
        "sample/b/merged/ours": {"status": "failed", "why": "out of memory"},
    }  # fmt: skip
    bound = {"sample/a/merged/ours": {"bandwidth_reached": 0.25}}
    found = gpu_targets.targets(done, bound, {"measured_h": 10.0}, on_gpu=True)
    assert [(target.verdict, target.figure) for target in found] == [
        ("missed", "1 of 2; worst +16% (train/a/qlora/sft)"),
        ("missed", "2 of 3; worst +31% (train/a/qlora/sft)"),
        ("holds", "6.00 (sample/a/merged/ours)"),
        ("missed", "0.98 (sample/a/merged/ours)"),
        ("holds", "1.25 (sample/a/merged/ours)"),
        ("holds", "0.25 (sample/a/merged/ours)"),
        ("not measured", None),
        ("holds", "10.0 h"),
    ]
    nothing = gpu_targets.targets({}, {}, {"measured_h": None}, on_gpu=True)
    assert {target.verdict for target in nothing} == {"not measured"}


def test_the_night_takes_unsloths_training_and_says_what_is_missing():
    import gpu_targets

    parts = {
        f"train/llama-3.1-8b/{entrant}/{kind}": {"status": "done", "tokens_per_s": rate}
        for entrant, rate in (("qlora", 1000), ("unsloth", 2000))
        for kind in ("sft", "dpo")
    }
    device, shape = card(parse_memory("24GB")), FULL.shapes["llama-3.1-8b"]
    recipe = load_recipe(None, FULL.settings)
    hours = gpu_targets.night(parts, recipe, FULL.work, shape, "llama-3.1-8b", device)
    assert hours["rates"] == {"sft": 2000, "dpo": 2000}
    assert hours["stages"]["sampling"]["measured_h"] is None
    assert hours["measured_h"] is None
    assert hours["stages"]["sft"]["measured_h"] < hours["stages"]["sft"]["planned_h"]
    small = gpu_targets.night(parts, recipe, FULL.work, shape, "llama-3.1-8b", card(parse_memory("4GB")))
    assert "needs at least" in small["error"]


def test_the_papers_recipe_is_the_one_that_is_planned():
    ours, paper = load_recipe(None, FULL.settings), load_recipe("paper-llama3-8b-24gb")
    same = {"model", "sft", "dpo", "sampling"}  # but for what is cut to fit
    assert ours.model_dump(exclude=same) == paper.model_dump(exclude=same)
    cut = {"micro_batch_size", "max_rows", "memory_gib"}
    for section in ("sft", "dpo", "sampling"):
        assert getattr(ours, section).model_dump(exclude=cut) == getattr(paper, section).model_dump(exclude=cut)


def test_a_child_imports_unsloth_before_what_it_patches():
    """A spawned child imports the main module first."""
    line = "import gpu, sys; print(sorted({'transformers', 'peft', 'trl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", line], cwd=BENCH, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_bad_input_is_told_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--device", "cpu"])
    assert "add --tiny" in capsys.readouterr().err
    arguments = gpu.parse(["--tiny", "--device", "cpu"])
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"settings": {"tiny": False}}))
    with pytest.raises(RunError, match=r"other settings.*name another file"):
        gpu.open_record(path, arguments)
    with pytest.raises(RunError, match="there is no folder"):
        gpu.open_record(tmp_path / "missing" / "new.json", arguments)
    with pytest.raises(RecipeError, match="--again tran: there is no such part"):
        gpu.forget({"parts": {}}, ["tran"], full_parts(CPU))
