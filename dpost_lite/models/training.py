"""What SFT and DPO share: trainer arguments, LoRA weights in float32, and progress."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError
from dpost_lite.models.backends import compute_dtype, device
from dpost_lite.recipe import DpoRecipe, SftRecipe

Progress = Callable[..., None]
"""Called as `progress(steps_done, steps_total, "steps", loss=…)`."""

OPTIMISER_BYTES = {"paged_adamw_8bit": 2, "adamw_torch": 8, "adamw_torch_fused": 8}
"""Of the state that an optimiser keeps of each trained weight."""


def optimiser(*, on_gpu: bool, trains_adapter: bool) -> str:
    """Return transformers' name of the optimiser: 8-bit moments for adapters on a GPU, full ones elsewhere.

    "fused" updates in place; PyTorch's own choice on a GPU would copy all second moments.
    """
    if not on_gpu:
        return "adamw_torch"
    return "paged_adamw_8bit" if trains_adapter else "adamw_torch_fused"


def shared_arguments(
    recipe: SftRecipe | DpoRecipe, policy: Any, out: Path, *, seed: int, num_rows: int
) -> dict[str, Any]:
    """Return the arguments common to trl's SFTConfig and DPOConfig; every one explicit, defaults differ by version.

    Warm-up takes whole steps of its share only: transformers rounds up, and the first warm-up step has a learning rate
    of 0, so a training of one step would do nothing.
    """
    import torch

    on_gpu = device() == "cuda"
    micro = min(recipe.micro_batch_size, recipe.batch_size)
    num_accumulated = max(1, recipe.batch_size // micro)
    num_steps = math.ceil(num_rows / (micro * num_accumulated))
    if isinstance(recipe, SftRecipe):
        num_steps = math.ceil(num_steps * recipe.epochs)
    else:
        num_steps = min(num_steps, recipe.max_steps)
    return {
        "output_dir": str(out),
        "seed": seed,
        "data_seed": seed,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": num_accumulated,
        "max_steps": num_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": recipe.min_lr_ratio},
        "warmup_steps": int(recipe.warmup_ratio * num_steps),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": optimiser(on_gpu=on_gpu, trains_adapter=hasattr(policy, "peft_config")),
        "bf16": compute_dtype() is torch.bfloat16,
        "fp16": compute_dtype() is torch.float16,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": on_gpu,  # a CPU has the memory and not the time
        "padding_free": False,
        "max_length": None,  # lengths are checked before: nothing is cut in silence
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is no number is to be seen
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(trainer: Any, lengths: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """Run a trl trainer and return its log, one dictionary per optimiser step.

    `lengths` are the tokens of its rows; the longest are tried first, so that memory runs out now or never. Raises
    ModelError when the loss becomes infinite or NaN.
    """
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils import logging

    class Report(TrainerCallback):
        """Hands each logged step to `progress`, and stops where the loss is no number."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    raise ModelError(
                        f"training diverged: the loss is {logs['loss']} at step {state.global_step} of "
                        f"{state.max_steps}; lower sft.learning_rate or dpo.learning_rate"
                    )
                progress(state.global_step, state.max_steps, "steps", loss=logs["loss"])

    keep_float32(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Report())
    probe(trainer, lengths)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        trainer.train()
    finally:
        logging.set_verbosity(verbosity)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def probe(trainer: Any, lengths: Sequence[int]) -> None:
    """Run the micro-batch of the longest rows, forward and backward, and leave no trace.

    Twice, since all but the first of a step find the gradients of those before; and what the optimiser will hold is
    held meanwhile.
    """
    import torch

    arguments, model = trainer.args, trainer.model
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-arguments.per_device_train_batch_size :]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in longest])
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_bytes = num_trained * OPTIMISER_BYTES[arguments.optim.value]
    gpus = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        held = torch.ones(num_bytes, dtype=torch.uint8, device=model.device)
        if arguments.gradient_checkpointing:
            model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        model.train()
        for _ in range(min(2, arguments.gradient_accumulation_steps)):
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
            loss.backward()
        del held, loss
    model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    if gpus:
        torch.cuda.empty_cache()


def keep_float32(model: Any) -> None:
    """Undo trl's cast of LoRA weights to bfloat16 on a quantised base.

    At DPO's learning rates an update is below half a bfloat16 step and rounds away (measured at 5e-6: 3 % of entries
    moved in 8 steps, all of them in float32).
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
