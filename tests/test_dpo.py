"""DPO on a tiny model: where it starts, what it trains on, and its losses."""

import math
import re
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import torch
from tiny_training import (
    LN2,
    TOLERANCE,
    TYPES,
    answer_logprob,
    calculator_of,
    load,
    lora_weights,
    make_trainer,
    pairs,
    rows,
    run_dpo,
    same,
    saved,
    trainers_of,
    whole,
    without_result,
)

from dpost_lite.errors import DataError, RecipeError
from dpost_lite.models import adapters, dpo
from dpost_lite.models.order import ByLength
from dpost_lite.recipe import DpoRecipe


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


def test_rows_of_a_step_by_length_train_the_same(base_dir, prompter, policy_dir, tmp_path, monkeypatch):
    """With less padding: losses and weights are those of the same rows in the order in which they were drawn.

    The last micro-batch has one row, of the longest, which weighs as much as two others.
    """
    by_length, found = ByLength.__iter__, {}
    uneven = [replace(pair, chosen_ids=pair.chosen_ids * (1 + i % 3)) for i, pair in enumerate(pairs(prompter, 7))]
    for name in ("by length", "as drawn"):
        if name == "as drawn":
            monkeypatch.setattr(ByLength, "__iter__", lambda s: by_length(ByLength([1] * len(s), 4, 2, seed=s._seed)))
        recipe = DpoRecipe(batch_size=4, micro_batch_size=2, learning_rate=1e-3)
        policy = adapters.load_for_dpo(base_dir, policy_dir, whole(dpo=recipe), "plain")
        trainers: list[Any] = trainers_of(dpo, monkeypatch)
        losses: list[float] = []
        dpo.train_dpo(
            policy, prompter, uneven, tmp_path / name, recipe=recipe, seed=44, checkpoint_s=600,
            progress=lambda *_, losses=losses, **step: losses.append(step["loss"]),
        )  # fmt: skip
        order = list(trainers[0].get_train_dataloader().batch_sampler.sampler)
        found[name] = (losses, saved(tmp_path / name), order)
    (losses, weights, order), (losses_before, weights_before, order_before) = found.values()
    assert losses == pytest.approx(losses_before, rel=1e-4)
    for key, values in weights.items():
        torch.testing.assert_close(values, weights_before[key], rtol=1e-3, atol=1e-6)
    assert order != order_before
    assert [sorted(order[:4]), sorted(order[4:])] == [sorted(order_before[:4]), sorted(order_before[4:])]


def test_a_pairs_loss_and_gradient_do_not_depend_on_its_micro_batch(base_dir, prompter, policy_dir, tmp_path):
    """In micro-batches by length, as drawn, and of one pair each, without any padding but within the pair."""
    uneven = [{**row, "chosen_ids": row["chosen_ids"] * (1 + i % 3)} for i, row in enumerate(rows(prompter, 12))]
    recipe = DpoRecipe(batch_size=4, micro_batch_size=2)
    policy = adapters.load_for_dpo(base_dir, policy_dir, whole(dpo=recipe), "plain")
    trainer = dpo.make_trainer(policy, prompter, uneven, tmp_path, recipe, 42)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for i, weights in enumerate(trained.values()):  # away from the reference, where all losses are ln 2
            weights += 0.05 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(i))
    by_length = list(trainer.get_train_dataloader().batch_sampler.sampler)

    def losses_and_gradients(order: list[int], micro: int) -> tuple[dict[frozenset[int], float], dict[str, Any]]:
        trainer.model.zero_grad()
        losses = {}
        for start in range(0, len(order), micro):
            batch = order[start : start + micro]
            loss = trainer.compute_loss(trainer.model, trainer.data_collator([uneven[i] for i in batch]))
            (loss * len(batch)).backward()
            losses[frozenset(batch)] = loss.item()
        return losses, {n: p.grad.clone() for n, p in trained.items()}

    alone, expected = losses_and_gradients(by_length, 1)
    assert max(alone.values()) - min(alone.values()) > 0.01
    for order in (by_length, list(range(12))):
        losses, gradients = losses_and_gradients(order, 2)
        for batch, loss in losses.items():
            assert loss == pytest.approx(mean(alone[frozenset([i])] for i in batch), rel=1e-4)
        for name, values in gradients.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-5)


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


def test_what_the_calculator_writes_can_be_left_out_of_the_comparison(base_dir, prompter, policy_dir, tmp_path):
    trainer = make_trainer(base_dir, prompter, policy_dir, tmp_path, inserted=calculator_of(prompter))
    given = rows(prompter)
    batch = trainer.data_collator(given)
    num = len(given)
    for i, row in enumerate(given):
        chosen, rejected = (batch["input_ids"][k][batch["completion_mask"][k].bool()].tolist() for k in (i, num + i))
        assert tuple(chosen) == without_result(prompter, row["chosen_ids"])
        assert rejected == row["rejected_ids"]  # without an annotation


def test_kept_steps_are_read_and_get_no_gradient(base_dir, prompter, policy_dir, tmp_path):
    """The loss of a step-controlled pair depends on the rests alone: its gradient at the kept steps is exactly 0."""
    (pair,) = pairs(prompter, 1)
    kept, own, other = pair.chosen_ids[:9], pair.chosen_ids[9:], pair.rejected_ids
    recipe = DpoRecipe(batch_size=1, micro_batch_size=1)
    policy = adapters.load_for_dpo(base_dir, policy_dir, whole(), "plain")
    made: list[dict[str, list[int]]] = []

    def make(policy, prompter, rows, *arguments):
        made.extend(rows)
        return real(policy, prompter, rows, *arguments)

    real = dpo.make_trainer
    stepwise = replace(pair, prefix_ids=kept, chosen_ids=own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "make_trainer", make)
        dpo.train_dpo(
            policy, prompter, [stepwise], tmp_path / "out", recipe=recipe, seed=1,
            progress=lambda *_, **__: None, checkpoint_s=600,
        )  # fmt: skip
    question = list(prompter.prompt_ids(pair.question))
    assert made == [{"prompt_ids": [*question, *kept], "chosen_ids": list(own), "rejected_ids": list(other)}]

    policy = adapters.load_for_dpo(base_dir, policy_dir, whole(), "plain")
    trainer = real(policy, prompter, made, tmp_path / "trainer", recipe, 1)
    states = []

    def keep(module, inputs, out):
        if out.requires_grad:
            out.retain_grad()
            states.append(out)

    trainer.model.get_base_model().model.norm.register_forward_hook(keep)  # its output makes the logits, by position
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.data_collator(made)).backward()
    (found,) = (out.grad for out in states)
    first = len(question) + len(kept) - 1  # the position that predicts the rest's first token
    assert not found[:, :first].any()
    assert found[0, first : first + len(own)].abs().sum(-1).gt(0).all()
    assert found[1, first : first + len(other)].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize(("max_logp_drop", "num_steps"), [(None, 8), (1e6, 8), (1e-6, 2)])
def test_a_training_ends_when_rationales_have_lost_too_much(
    base_dir, prompter, policy_dir, tmp_path, max_logp_drop, num_steps
):
    totals = []
    figures = run_dpo(
        base_dir, prompter, policy_dir, tmp_path, num=8, batch_size=1, micro_batch_size=1, learning_rate=1e-2,
        warmup_ratio=0, max_logp_drop=max_logp_drop,
        progress=lambda done, total, *_, **__: totals.append((done, total)),
    )  # fmt: skip
    assert figures["steps"] == num_steps  # the first step finds no change
    assert figures.get("ended_early", False) == (num_steps < 8)
    assert totals[-1] == (num_steps, num_steps)


def test_the_weights_before_the_fall_are_kept(base_dir, prompter, policy_dir, tmp_path):
    """Step 2 finds what step 1 did: the policy is again as it was before step 1, where nothing had fallen."""
    run_dpo(
        base_dir, prompter, policy_dir, tmp_path, num=8, batch_size=1, micro_batch_size=1, learning_rate=1e-2,
        warmup_ratio=0, max_logp_drop=1e-6,
    )  # fmt: skip
    before = lora_weights(adapters.attach(load(base_dir), policy_dir, trainable=False))
    assert same(lora_weights(adapters.attach(load(base_dir), tmp_path, trainable=False)), before)


def test_a_training_that_goes_on_knows_which_weights_were_good(base_dir, prompter, policy_dir, tmp_path):
    """Stopped after step 1, whose update step 2 finds bad: the weights before step 1 come back, as without a stop."""

    def stop(done, *_, **__):
        if done == 1:
            raise KeyboardInterrupt

    settings = dict(num=8, batch_size=1, micro_batch_size=1, learning_rate=1e-2, warmup_ratio=0, max_logp_drop=1e-6)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(base_dir, prompter, policy_dir, tmp_path, progress=stop, **settings)
    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path, **settings)
    assert figures["steps"] == 2
    before = lora_weights(adapters.attach(load(base_dir), policy_dir, trainable=False))
    assert same(lora_weights(adapters.attach(load(base_dir), tmp_path, trainable=False)), before)


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
