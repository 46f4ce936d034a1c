"""Small trainings of a tiny model: what the tests of SFT, DPO, precision and backends share."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dpost_lite.models import adapters, dpo, loading, sft
from dpost_lite.models.backend import Backend
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import LabelledRationale, PreferencePair
from dpost_lite.problems.tools import Tools
from dpost_lite.recipe import DpoRecipe, LoraRecipe, ModelRecipe, Recipe, SftRecipe

LN2 = math.log(2)
LORA = LoraRecipe(rank=4, alpha=8)
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the logits of two equal models, relative
TYPES = ["float32", "bfloat16"]  # each is tested on every machine, whatever its processor multiplies


def labelled(prompter: Prompter, num: int = 8) -> list[LabelledRationale]:
    items = []
    for i in range(num):
        text = f"She has {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"
        question = f"Ann has {i} boxes and buys {i} more. How many?"
        items.append(LabelledRationale(str(i), question, text, prompter.answer_ids(text), is_gold=True))
    return items


def pairs(prompter: Prompter, num: int = 4) -> list[PreferencePair]:
    """Pairs whose rejected side was cut off: it ends without a stop token."""
    made = []
    for item in labelled(prompter, num):
        wrong = f"She buys {item.problem_id} apples, and then she"
        ids = prompter.answer_ids(wrong)[:-1]
        made.append(PreferencePair(item.problem_id, item.question, item.text, wrong, item.token_ids, ids))
    return made


def rows(prompter: Prompter, num: int = 4) -> list[dict[str, list[int]]]:
    return [
        {
            "prompt_ids": list(prompter.prompt_ids(pair.question)),
            "chosen_ids": list(pair.chosen_ids),
            "rejected_ids": list(pair.rejected_ids),
        }
        for pair in pairs(prompter, num)
    ]


def no_progress(*_: Any, **__: Any) -> None: ...


def load(model_dir: Path, precision: str = "4bit", compute: str = "float32") -> Any:
    return loading.load(model_dir, precision, compute=compute)


def model_recipe(precision: str = "4bit", compute: str = "float32") -> ModelRecipe:
    return ModelRecipe(precision=precision, compute_dtype=compute)


def whole(*, seed: int = 42, precision: str = "4bit", compute: str = "float32", **sections) -> Recipe:
    return Recipe(seed=seed, model=model_recipe(precision, compute), lora=LORA, **sections)


def calculator_of(prompter: Prompter) -> Any:
    """What finds the calculator's tokens."""
    return Tools(Calculator()).inserted(prompter.token_text(), prompter.encode, calculated_in_loss=False)


def without_result(prompter: Prompter, answer: tuple[int, ...]) -> tuple[int, ...]:
    """The ids of an answer of `labelled` without `6>>6`, which the calculator writes."""
    text = prompter.text(answer)
    start, end = text.index("=", text.index("<<")) + 1, text.index(".\n")
    ids = (*prompter.encode(text[:start]), *prompter.encode(text[end:]), prompter.stop_id)
    assert len(ids) < len(answer)
    return ids


def run_sft(
    base_dir: Path,
    prompter: Prompter,
    out: Path,
    *,
    seed: int = 42,
    num: int = 8,
    precision="4bit",
    compute="float32",
    backend: Backend = "plain",
    progress=no_progress,
    checkpoint_s: float = 600,
    inserted=None,
    **settings,
) -> dict[str, Any]:
    recipe = SftRecipe(**{"epochs": 1, "batch_size": 4, "micro_batch_size": 4, **settings})
    of_run = whole(seed=seed, sft=recipe, precision=precision, compute=compute)
    policy = adapters.load_for_sft(base_dir, of_run, backend)
    return sft.train_sft(
        policy,
        prompter,
        labelled(prompter, num),
        out,
        recipe=recipe,
        seed=seed,
        progress=progress,
        checkpoint_s=checkpoint_s,
        inserted=inserted,
    )


def run_dpo(
    base_dir,
    prompter,
    policy_dir,
    out,
    *,
    seed: int = 42,
    num: int = 4,
    precision="4bit",
    compute="float32",
    backend: Backend = "plain",
    progress=no_progress,
    checkpoint_s: float = 600,
    inserted=None,
    **settings,
):
    recipe = DpoRecipe(**{"batch_size": 4, "micro_batch_size": 4, **settings})
    of_run = whole(seed=seed, dpo=recipe, precision=precision, compute=compute)
    policy = adapters.load_for_dpo(base_dir, policy_dir, of_run, backend)
    return dpo.train_dpo(
        policy,
        prompter,
        pairs(prompter, num),
        out,
        recipe=recipe,
        seed=seed,
        progress=progress,
        checkpoint_s=checkpoint_s,
        inserted=inserted,
    )


def make_trainer(
    base_dir, prompter, policy_dir, out, *, precision="4bit", compute="float32", inserted=None, **settings
) -> Any:
    recipe = DpoRecipe(**{"batch_size": 4, "micro_batch_size": 4, **settings})
    policy = adapters.load_for_dpo(base_dir, policy_dir, whole(precision=precision, compute=compute), "plain")
    return dpo.make_trainer(policy, prompter, rows(prompter), out, recipe, 42, inserted=inserted)


def trainers_of(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that fills with the trainers that `module` trains with."""
    trainers: list[Any] = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda trainer, *a, **k: trainers.append(trainer) or real(trainer, *a, **k))
    return trainers


def saved(adapter_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter_dir / "adapter_model.safetensors")


def lora_weights(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    found = {n.replace(f".{adapter}.", "."): p.detach() for n, p in model.named_parameters() if f".{adapter}." in n}
    assert found
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float()


def divergence(logits_p: torch.Tensor, logits_q: torch.Tensor) -> float:
    """Mean KL(p, q) over positions, in nats."""
    p, q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def answer_logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Sum of log π over an answer's tokens, written out."""
    logprobs = logits(model, (*prompt, *answer)).log_softmax(-1)[len(prompt) - 1 : -1]
    return float(logprobs[torch.arange(len(answer)), torch.tensor(answer)].sum())


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
