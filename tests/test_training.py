"""SFT, and what SFT and DPO share: steps, batches, seeds, and what is saved."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import (
    LORA,
    TYPES,
    answer_logprob,
    calculator_of,
    labelled,
    load,
    lora_weights,
    run_dpo,
    run_sft,
    same,
    saved,
    trainers_of,
    without_result,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from dpost_lite.errors import DataError, ModelError
from dpost_lite.models import adapters, dpo, sft
from dpost_lite.models.training import keep_float32, shared_arguments
from dpost_lite.recipe import DpoRecipe, SftRecipe


def test_sft_loss_is_on_the_answer_and_its_stop_token_alone(base_dir, prompter, tmp_path, monkeypatch):
    trainers = trainers_of(sft, monkeypatch)
    figures = run_sft(base_dir, prompter, tmp_path, num=4)
    loader = trainers[0].get_train_dataloader()
    assert isinstance(loader.batch_sampler.sampler, LengthGroupedSampler)
    batch = next(iter(loader))
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


def test_what_the_calculator_writes_can_be_left_out_of_the_loss(base_dir, prompter, tmp_path, monkeypatch):
    trainers = trainers_of(sft, monkeypatch)
    run_sft(base_dir, prompter, tmp_path, num=4, inserted=calculator_of(prompter))
    batch = next(iter(trainers[0].get_train_dataloader()))
    found = {tuple(labels[labels != -100].tolist()) for labels in batch["labels"]}
    assert found == {without_result(prompter, item.token_ids) for item in labelled(prompter, 4)}


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
        (SftRecipe(batch_size=8, max_steps=5), 100, 5, 0),
        (SftRecipe(batch_size=8, max_steps=50), 100, 26, 2),
        (DpoRecipe(), 1, 1, 0),  # one warm-up step would be the only one, at a learning rate of 0
        (DpoRecipe(), 12_800, 100, 10),
        (DpoRecipe(), 99_999, 100, 10),
        (DpoRecipe(batch_size=2), 31, 16, 1),
        (DpoRecipe(batch_size=2, epochs=3), 31, 48, 4),
        (DpoRecipe(batch_size=2, epochs=30), 31, 100, 10),
    ],
)
def test_number_of_steps(tmp_path, recipe, num_rows, num_steps, num_warmup):
    policy = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(1, 1))
    arguments = shared_arguments(recipe, policy, tmp_path, seed=1, num_rows=num_rows)
    assert (arguments["max_steps"], arguments["warmup_steps"]) == (num_steps, num_warmup)
    at_once = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    assert at_once == recipe.batch_size


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_saved_folder_holds_one_adapter_and_nothing_else(base_dir, prompter, policy_dir, tmp_path, stage):
    if stage == "sft":
        run_sft(base_dir, prompter, tmp_path)
    else:
        run_dpo(base_dir, prompter, policy_dir, tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {"rewards.jsonl"}  # of DPO, for the report
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
