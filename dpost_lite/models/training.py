"""What SFT and DPO share: trainer arguments, LoRA weights in float32, progress, and resuming."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError
from dpost_lite.models import hardware
from dpost_lite.models.checkpoint import Checkpoints, LastGood
from dpost_lite.models.private_api import forget_batches, loss_of, skip_pickles
from dpost_lite.models.tracking import track
from dpost_lite.recipe import DpoRecipe, SftRecipe
from dpost_lite.system.turns import turns

Progress = Callable[..., None]
"""Called as `progress(steps_done, steps_total, "steps", loss=…)`; DPO adds what `dpo.figures` returns."""

OPTIMISER_BYTES = {"paged_adamw_8bit": 2, "adamw_torch": 8, "adamw_torch_fused": 8}
"""Bytes of optimiser state per trained weight."""

LOSSES_BEFORE = 20  # to compare the first loss after a checkpoint with


def optimiser(*, on_gpu: bool, trains_adapter: bool) -> str:
    """Return transformers' name of the optimiser: 8-bit moments for adapters on a GPU, full ones elsewhere.

    "fused" updates in place; PyTorch's default on a GPU would copy all second moments.
    """
    if not on_gpu:
        return "adamw_torch"
    return "paged_adamw_8bit" if trains_adapter else "adamw_torch_fused"


def shared_arguments(
    recipe: SftRecipe | DpoRecipe, policy: Any, out: Path, *, seed: int, num_rows: int, report_to: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the trainer arguments that SFT and DPO share; all explicit, since defaults differ by version.

    The number of warm-up steps is rounded down: transformers rounds up, and the first warm-up step has a learning rate
    of 0, so a training of one step would do nothing.
    """
    import torch

    on_gpu = hardware.device() == "cuda"
    dtype = policy.get_input_embeddings().weight.dtype  # the compute type, or float32 where all weights are trained
    micro = min(recipe.micro_batch_size, recipe.batch_size)
    num_accumulated = max(1, recipe.batch_size // micro)
    num_steps = math.ceil(math.ceil(num_rows / (micro * num_accumulated)) * recipe.epochs)
    num_steps = min(num_steps, recipe.max_steps or num_steps)
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
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": on_gpu,  # a CPU has memory to spare, but no time
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # show a loss of NaN or infinity
        "disable_tqdm": True,
        **track(report_to, out),
    }


def train(
    trainer: Any,
    lengths: Sequence[int],
    progress: Progress,
    checkpoint_s: float,
    figures: Callable[[dict[str, Any]], dict[str, float]] = lambda _: {},
    is_bad: Callable[[dict[str, float]], bool] | None = None,
) -> list[dict[str, Any]]:
    """Run a transformers Trainer and return its log, one dictionary per optimiser step.

    `lengths` are what the memory of its rows grows with (`Family.memory_length`); the longest are tried first, so that
    an out-of-memory error happens before training starts. Resumes from the newest checkpoint in its folder; writes one
    every `checkpoint_s` seconds, and one when `progress` raises KeyboardInterrupt. `progress` gets each step's loss and
    what `figures` makes of its log; the training ends early after a step whose figures are bad, with the weights before
    the last step that was not.
    Raises ModelError if the loss becomes infinite or NaN, or jumps after resuming.
    """
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils import logging

    keep_float32(trainer.model)
    cores = turns() if trainer.args.use_cpu else None
    good = LastGood(trainer.model) if is_bad else None
    checkpoints = Checkpoints(trainer, Path(trainer.args.output_dir), interval_s=checkpoint_s, good=good)
    newest = checkpoints.newest()

    class Report(TrainerCallback):
        """Reports each logged step, stops if the loss is not finite, and writes checkpoints."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            if newest is not None:
                checkpoints.restore(newest)

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            checkpoints.epoch_begins()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            checkpoints.step_begins()
            if good:
                good.step_begins()
            self.on_substep_end()

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            if cores:
                cores.take()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            check_loss_of_step(state, newest)
            found = figures(logs)
            if good and is_bad and is_bad(found):
                good.restore()
                control.should_training_stop = True
                state.max_steps = state.global_step
            else:
                if good:
                    good.step_was_good()
                if checkpoints.is_due():
                    checkpoints.save()
            try:
                progress(state.global_step, state.max_steps, "steps", loss=logs["loss"], **found)
            except KeyboardInterrupt:
                if state.global_step < state.max_steps:  # after the last step the policy itself is saved
                    checkpoints.save()
                    raise

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Report())
    probe(trainer, lengths)
    skip_pickles(trainer)  # on_train_begin restores our own checkpoint
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        if cores:
            cores.end()
        logging.set_verbosity(verbosity)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_loss_of_step(state: Any, resumed: Path | None) -> None:
    """Raise ModelError if the newest loss of a Trainer's state is not finite, or far off in the first resumed step.

    The latter would show a training that silently started from the beginning.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    step = f"step {state.global_step} of {state.max_steps}"
    if not math.isfinite(losses[-1]):
        raise ModelError(
            f"training diverged: the loss is {losses[-1]} at {step}; lower sft.learning_rate or dpo.learning_rate"
        )
    if resumed is None or state.global_step != int(resumed.name.partition("-")[2]) + 1:
        return
    largest = max(losses[:-1][-LOSSES_BEFORE:])
    if losses[-1] > 2 * largest + 0.5:
        raise ModelError(
            f"at {step}, the first after {resumed.name}, the loss is {losses[-1]:.3g}, and was at most {largest:.3g} "
            f"before: the checkpoint does not fit; remove {resumed} to train this stage from its beginning"
        )


def probe(trainer: Any, lengths: Sequence[int]) -> None:
    """Run the micro-batch of the longest rows, forward and backward, without a lasting effect.

    Twice, since all but the first of a step find gradients of earlier ones in memory; a block of the optimiser's size
    is held meanwhile.
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
        backward(trainer, batch, times=min(2, arguments.gradient_accumulation_steps))
        del held
    model.zero_grad(set_to_none=True)
    forget_batches(trainer)
    if gpus:
        torch.cuda.empty_cache()


def backward(trainer: Any, batch: Any, *, times: int) -> None:
    """Add the gradients of a micro-batch to the model's, `times` times."""
    for _ in range(times):
        with trainer.accelerator.autocast():
            loss = loss_of(trainer, trainer.model, batch)
        loss.backward()


def keep_float32(model: Any) -> None:
    """Keep what is trained in float32: on a quantised base, trl casts LoRA weights to bfloat16.

    At DPO's learning rates an update is below half a bfloat16 step and rounds away (measured at 5e-6: 3 % of entries
    moved in 8 steps, all of them in float32).
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
