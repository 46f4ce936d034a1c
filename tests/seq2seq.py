"""Small trainings of a tiny T5, saved as Flan-T5 is: what the tests of encoder–decoders share."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_t5 import t5_tokenizer
from tiny_training import LORA, no_progress, whole

from dpost_lite.models import adapters, dpo, loading, sft
from dpost_lite.models.vector_maths import choose_kernels
from dpost_lite.problems.prompts import EncoderDecoderPrompter
from dpost_lite.problems.records import LabelledRationale, PreferencePair
from dpost_lite.recipe import DpoRecipe, SftRecipe


def tiny_t5(**overrides: Any) -> Any:
    """Return a random T5 of version 1.1 in float32, always the same; its head is not its embedding."""
    from transformers import T5Config, T5ForConditionalGeneration

    choose_kernels()
    torch.manual_seed(0)
    settings = dict(
        vocab_size=-(-len(t5_tokenizer()) // 32) * 32, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**{**settings, **overrides}))
    model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(model.shared.weight))
    return model.float().eval()


def save_as_flan(model: Any, folder: Path) -> Path:
    """Save it as Google saved Flan-T5: the head as a tensor of its own, and `tie_word_embeddings` false."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("scale_decoder_outputs")
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    copy.deepcopy(t5_tokenizer()).save_pretrained(folder)
    return folder


def make_policy(base: Path, out: Path) -> Path:
    """Save an adapter that does something: B is not zero."""
    model = adapters.create(loading.load(base, compute="float32"), LORA, seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    adapters.save(model, None, out)
    return out


def labelled(prompter: EncoderDecoderPrompter, num: int = 8) -> list[LabelledRationale]:
    """Rationales of different lengths."""
    made = []
    for i in range(num):
        text = f"She has {i}+{i}= [ {i}+{i}={2 * i} ] {2 * i}{' apples' * (i % 3)}. #### {2 * i}"
        question = f"Ann has {i} boxes{' and buys' * (i % 4)} {i} more. How many?"
        made.append(LabelledRationale(str(i), question, text, prompter.answer_ids(text), is_gold=True))
    return made


def pairs(prompter: EncoderDecoderPrompter, num: int = 4, *, prefix: int = 0) -> list[PreferencePair]:
    """Pairs whose rejected side was cut off; both continue the first `prefix` tokens of the chosen side."""
    made = []
    for item in labelled(prompter, num):
        wrong = f"She buys {item.problem_id} apples{' and then she' * (1 + int(item.problem_id) % 3)}"
        pair = PreferencePair(
            item.problem_id, item.question, item.text, wrong, item.token_ids, prompter.answer_ids(wrong)[:-1]
        )
        made.append(replace(pair, prefix_ids=pair.chosen_ids[:prefix], chosen_ids=pair.chosen_ids[prefix:]))
    return made


def run_sft(
    base: Path, prompter: Any, out: Path, *, num=8, precision="4bit", progress=no_progress, inserted=None, **settings
):
    recipe = SftRecipe(**{"epochs": 1, "batch_size": 4, "micro_batch_size": 4, **settings})
    policy = adapters.load_for_sft(base, whole(sft=recipe, precision=precision), "plain")
    return sft.train_sft(
        policy, prompter, labelled(prompter, num), out, recipe=recipe, seed=42, progress=progress, checkpoint_s=600,
        inserted=inserted,
    )  # fmt: skip


def run_dpo(
    base: Path,
    prompter: Any,
    policy_dir: Path,
    out: Path,
    *,
    num=4,
    prefix=0,
    precision="4bit",
    progress=no_progress,
    **settings,
):
    recipe = DpoRecipe(**{"batch_size": 4, "micro_batch_size": 4, **settings})
    policy = adapters.load_for_dpo(base, policy_dir, whole(dpo=recipe, precision=precision), "plain")
    return dpo.train_dpo(
        policy, prompter, pairs(prompter, num, prefix=prefix), out, recipe=recipe, seed=42, progress=progress,
        checkpoint_s=600,
    )  # fmt: skip


def dpo_trainer(
    base: Path,
    prompter: Any,
    policy_dir: Path,
    out: Path,
    given: list[PreferencePair],
    *,
    precision="4bit",
    inserted=None,
    compute="float32",
    **settings,
) -> Any:
    recipe = DpoRecipe(**{"batch_size": 4, "micro_batch_size": 4, **settings})
    policy = adapters.load_for_dpo(base, policy_dir, whole(precision=precision, compute=compute), "plain")
    family = dpo.family_of_model(policy)
    rows = [family.dpo_row(prompter.prompt_ids(p.question), p.prefix_ids, p.chosen_ids, p.rejected_ids) for p in given]
    return dpo.make_trainer(policy, prompter, rows, out, recipe, 42, inserted=inserted)


def answer_logprob(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...], first: int = 0) -> float:
    """Sum of log π over an answer's tokens from `first` on, written out, without padding."""
    with torch.no_grad():
        logits = model.eval()(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])
        ).logits[0]
    logprobs = logits.float().log_softmax(-1)
    return float(logprobs[torch.arange(len(answer)), torch.tensor(answer)][first:].sum())
