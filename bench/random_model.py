"""A model folder for a benchmark: a real model, or random weights of a known shape."""

import argparse
from pathlib import Path

from dpost_lite.models import demo, hardware, hub, loading
from dpost_lite.models.shapes import BASES, ModelShape
from dpost_lite.planner.plan import find_shape
from dpost_lite.system import quiet


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model and --shape, of which one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--model", help="a folder, a hub id, or smollm2-135m-instruct (the default)")
    group.add_argument("--shape", choices=[name.split("/")[-1].lower() for name in BASES], help="random weights")


def model_folder(arguments: argparse.Namespace, scratch: Path) -> tuple[Path, ModelShape]:
    """Return the model's folder, made in `scratch` for a shape, and its shape."""
    if arguments.shape is None:
        name = arguments.model or demo.DEMO_MODEL
        return hub.find(name), find_shape(name)
    shape = next(base.shape for name, base in BASES.items() if name.split("/")[-1].lower() == arguments.shape)
    return save_random(shape, scratch / arguments.shape), shape


def save_random(shape: ModelShape, folder: Path) -> Path:
    """Save random bfloat16 weights of `shape` with the demo model's tokenizer, whose ids any vocabulary here holds."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = shape.config()
    config.bos_token_id = config.eos_token_id = None  # nothing that it writes ends an answer
    with torch.device(hardware.device()):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with quiet.quiet_transformers():
        model.save_pretrained(folder)
    loading.load_tokenizer(hub.find(demo.DEMO_MODEL)).save_pretrained(folder)
    return folder
