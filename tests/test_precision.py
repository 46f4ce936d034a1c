"""LoRA on 16 bit, all weights, the probe before training, and unsloth's part: the same training, held differently."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    LN2,
    TOLERANCE,
    labelled,
    load,
    logits,
    model_recipe,
    run_dpo,
    run_sft,
    same,
    saved,
    trainers_of,
)

from dpost_lite.errors import ModelError
from dpost_lite.models import adapters, dpo, hardware, loading, sft
from dpost_lite.models.backend import FIRST_IMPORTS, choose_backend
from dpost_lite.models.training import probe
from dpost_lite.recipe import LoraRecipe, ModelRecipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.system.machine import cache_dir

# All weights


def test_full_fine_tuning_moves_every_weight_and_saves_a_model(base_dir, full_dir, prompter):
    before = load(base_dir, "full").state_dict()
    after = load(full_dir, "full").state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype == torch.float32
        moved = (after[name] != weight).float().mean()
        assert moved > (0.1 if "embed" in name or "lm_head" in name else 0.9), name
    assert not adapters.is_adapter(full_dir)
    assert loading.load_tokenizer(full_dir).chat_template == prompter.tokenizer.chat_template


def test_full_dpo_goes_on_from_the_policy_and_learns(base_dir, full_dir, prompter, tmp_path):
    figures = run_dpo(
        base_dir, prompter, full_dir, tmp_path, num=16, precision="full", micro_batch_size=2, learning_rate=1e-4
    )
    assert figures["first_loss"] == pytest.approx(LN2, abs=1e-5)
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["last_margin"] > 0
    assert (tmp_path / "model.safetensors").exists()


def test_a_policy_of_all_weights_is_sampled_as_it_was_saved(base_dir, full_dir, prompter):
    ids = labelled(prompter, 1)[0].token_ids
    expected = logits(load(full_dir, "full"), ids)
    for weights in ("merged", "quantized"):  # there is nothing to quantise
        recipe = load_recipe(
            None, ["model.precision=full", "model.compute_dtype=float32", f"sampling.weights={weights}"]
        )
        found = logits(adapters.load_policy(base_dir, full_dir, recipe), ids)
        assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE["float32"]
    found = logits(adapters.load_merged(base_dir, full_dir, model_recipe("full")), ids)
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE["float32"]


def test_lora_learns_alike_on_sixteen_bits_and_on_four(base_dir, prompter, tmp_path):
    """Same data order, same loss but for the rounding of the base."""
    four = run_sft(base_dir, prompter, tmp_path / "4", learning_rate=1e-3)
    sixteen = run_sft(base_dir, prompter, tmp_path / "16", learning_rate=1e-3, precision="16bit")
    assert four["steps"] == sixteen["steps"]
    assert four["first_loss"] == pytest.approx(sixteen["first_loss"], rel=0.05)
    assert four["last_loss"] == pytest.approx(sixteen["last_loss"], rel=0.05)
    assert four["first_loss"] != sixteen["first_loss"]


# The probe


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_longest_rows_are_tried_first_and_leave_no_trace(
    base_dir, prompter, policy_dir, tmp_path, monkeypatch, kind
):
    seen = []

    def train(out: Path) -> dict[str, Any]:
        if kind == "sft":
            return run_sft(base_dir, prompter, out, num=8, micro_batch_size=2)
        return run_dpo(base_dir, prompter, policy_dir, out, num=8, micro_batch_size=2)

    def spied(trainer, lengths):
        inner = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs: seen.append(inputs["input_ids"].shape) or inner(model, inputs)
        state = torch.random.get_rng_state()
        probe(trainer, lengths)
        del trainer.compute_loss
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(p.grad is None for p in trainer.model.parameters())
        assert max(lengths) == seen[0][1]

    with_probe = train(tmp_path / "with")
    monkeypatch.setattr("dpost_lite.models.training.probe", spied)
    assert train(tmp_path / "spied") == with_probe
    assert seen[0][0] == (2 if kind == "sft" else 4)
    monkeypatch.setattr("dpost_lite.models.training.probe", lambda *_: None)
    assert train(tmp_path / "without") == with_probe
    assert same(saved(tmp_path / "with"), saved(tmp_path / "without"))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_checkpoints_as_on_a_gpu_change_nothing(base_dir, prompter, policy_dir, tmp_path, monkeypatch, kind):
    """A CPU has the memory to do without; that a 4-bit base with LoRA gets its gradients through them is seen here."""
    module = {"sft": sft, "dpo": dpo}[kind]

    def train(out: Path) -> dict[str, Any]:
        if kind == "sft":
            return run_sft(base_dir, prompter, out, num=8, learning_rate=1e-3)
        return run_dpo(base_dir, prompter, policy_dir, out, num=8, learning_rate=1e-3)

    plain = train(tmp_path / "plain")
    inner, trainers = module.shared_arguments, trainers_of(module, monkeypatch)
    monkeypatch.setattr(
        module, "shared_arguments", lambda *args, **kwargs: {**inner(*args, **kwargs), "gradient_checkpointing": True}
    )
    found = train(tmp_path / "checkpointed")
    assert trainers[0].model.is_gradient_checkpointing
    assert found["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
    assert found["last_loss"] == pytest.approx(plain["last_loss"], rel=1e-3)
    before, after = saved(tmp_path / "plain"), saved(tmp_path / "checkpointed")
    for name in before:
        is_close = torch.isclose(before[name], after[name], atol=1e-4)
        assert is_close.float().mean() > 0.98, name  # Adam's first steps are ±lr: noise flips those near zero
    if kind == "dpo":  # of a fresh adapter, B is zero, and A is not moved by the first step
        start = saved(policy_dir)
        assert all(float((after[name] - start[name]).abs().mean()) > 5e-4 for name in after)


# unsloth, whose package needs a GPU: what it is asked for


@pytest.fixture
def fast(monkeypatch):
    """Our module on a stand-in for unsloth, which does what transformers and peft do.

    It has only the arguments that we pass; test_unsloth_source.py checks their names and defaults.
    """
    import importlib
    import types

    calls = []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(
            model_name="unsloth/Llama-3.2-1B-Instruct", max_seq_length=2048, dtype=None, load_in_4bit=True,
            load_in_8bit=False, load_in_16bit=False, full_finetuning=False, trust_remote_code=False,
            use_gradient_checkpointing="unsloth", use_exact_model_name=False, fast_inference=False,
        ):  # fmt: skip
            calls.append(("from_pretrained", locals()))
            return load(Path(model_name), "4bit" if load_in_4bit else "16bit"), None

        @staticmethod
        def get_peft_model(
            model, r=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],  # noqa: B006
            lora_alpha=16, lora_dropout=0.0, bias="none", use_gradient_checkpointing="unsloth", random_state=3407,
            use_rslora=False, init_lora_weights=True,
        ):  # fmt: skip
            calls.append(("get_peft_model", locals()))
            return adapters.create(model, LoraRecipe(rank=r, alpha=lora_alpha), seed=random_state)

    monkeypatch.setitem(sys.modules, "unsloth", types.SimpleNamespace(FastLanguageModel=FastLanguageModel))
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", "")
    monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "")
    os.environ.pop("UNSLOTH_COMPILE_LOCATION")
    os.environ.pop("UNSLOTH_DISABLE_STATISTICS")
    name = FIRST_IMPORTS["unsloth"]
    assert name is not None
    yield importlib.import_module(name), calls
    sys.modules.pop(name)


def test_unsloth_is_asked_for_the_same_training(base_dir, policy_dir, prompter, tmp_path, fast):
    plain_sft = tmp_path / "plain"
    _, calls = fast
    through_unsloth = run_sft(base_dir, prompter, tmp_path / "fast", backend="unsloth")
    assert run_sft(base_dir, prompter, plain_sft) == through_unsloth
    assert same(saved(plain_sft), saved(tmp_path / "fast"))
    (_, loaded), (_, wrapped) = calls
    assert loaded["use_exact_model_name"] is loaded["load_in_4bit"] is True
    assert loaded["max_seq_length"] == 640
    assert loaded["model_name"] == str(base_dir)
    assert (wrapped["r"], wrapped["lora_alpha"], wrapped["random_state"]) == (4, 8, 42)
    assert os.environ["UNSLOTH_COMPILE_LOCATION"].startswith(str(cache_dir()))

    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path / "dpo", backend="unsloth")
    assert figures["first_loss"] == pytest.approx(LN2, abs=1e-6)
    assert run_dpo(base_dir, prompter, policy_dir, tmp_path / "plain-dpo") == figures


def test_unsloth_is_taken_where_it_can_run(monkeypatch):
    assert choose_backend(ModelRecipe()) == "plain"  # no GPU, or no unsloth
    monkeypatch.setattr(hardware, "device", lambda: "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert choose_backend(ModelRecipe()) == "unsloth"
    assert choose_backend(ModelRecipe(backend="plain")) == "plain"
    assert choose_backend(ModelRecipe(precision="full")) == "plain"
    monkeypatch.setattr(hardware, "device", lambda: "cpu")
    assert choose_backend(ModelRecipe()) == "plain"
    with pytest.raises(ModelError, match=r"model\.backend=unsloth needs a CUDA GPU"):
        choose_backend(ModelRecipe(backend="unsloth"))
