"""The two kinds of base models, decoder-only ones and encoder–decoders (T5): what differs lies behind `Family`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpost_lite.problems.prompts import EncoderDecoderPrompter, Prompter


@dataclass(frozen=True, slots=True)
class Family:
    """`auto_class` is the name of transformers' class that loads it, `task_type` that of peft."""

    auto_class: str
    task_type: str
    prompter: type[Prompter]


DECODER_ONLY = Family("AutoModelForCausalLM", "CAUSAL_LM", Prompter)
ENCODER_DECODER = Family("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", EncoderDecoderPrompter)


def family_of(model_dir: Path) -> Family:
    """Return the kind of the model saved in a folder; decoder-only if its config.json does not say."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return DECODER_ONLY  # loading will say what is wrong
    return ENCODER_DECODER if config.get("is_encoder_decoder") else DECODER_ONLY


def family_of_model(model: Any) -> Family:
    """Return the kind of a transformers model."""
    return ENCODER_DECODER if model.config.is_encoder_decoder else DECODER_ONLY
