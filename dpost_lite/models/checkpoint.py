"""Checkpoints of a training, to resume it at the step it had reached.

A checkpoint has everything the next step depends on: trained weights, optimiser, scheduler, position in the data, and
the random states, both current and from the start of the epoch, where its order is drawn. transformers' own checkpoints
are pickles, which this package never reads; these are safetensors and JSON. The Trainer itself skips to the position.
"""

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError, is_out_of_memory
from dpost_lite.runs.folder import UNFINISHED, read_json, write_json

LARGEST_SHARE = 0.01  # of a training's time may be spent on writing checkpoints
ASSUMED_BYTES_PER_S = 5e8  # until the first one is written
TRAINER_STATE = "trainer_state.json"  # transformers looks for it by this name


class LastGood:
    """The trained weights before the last step whose figures were good, kept in RAM.

    A step's figures are about the weights before its update. The first ones count as good.
    """

    def __init__(self, model: Any) -> None:
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._now = self.weights = self._copy()

    def step_begins(self) -> None:
        """Note the weights that the step's figures will be about."""
        self._now = self._copy()

    def step_was_good(self) -> None:
        """Keep the noted weights."""
        self.weights = self._now

    def restore(self) -> None:
        """Put the kept weights back."""
        for name, parameter in self._trained.items():
            parameter.data.copy_(self.weights[name])

    def _copy(self) -> dict[str, Any]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self._trained.items()}


class Checkpoints:
    """Writes and restores the checkpoints of one trainer, below the folder `out` of its stage.

    They are at least `interval_s` seconds apart, and further if they would take more than 1 % of the time. They hold
    `good` too.
    """

    def __init__(self, trainer: Any, out: Path, *, interval_s: float, good: LastGood | None = None) -> None:
        self._trainer = trainer
        self._good = good
        self._folder = out / UNFINISHED
        self._interval_s = interval_s
        self._trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        num_bytes = 3 * sum(p.nbytes for p in self._trained.values())  # two moments
        self._cost_s = num_bytes / ASSUMED_BYTES_PER_S
        self._saved_at, self._saved_step = time.monotonic(), -1
        self._epoch_rng: dict[str, Any] = {}
        self._to_restore: dict[str, Any] = {}  # random states to restore once the data are in place

    def newest(self) -> Path | None:
        """Return the newest checkpoint of a training that was stopped, if there is one. RunError if it is damaged."""
        found = {int(path.name.partition("-")[2]): path for path in self._folder.glob("checkpoint-*[0-9]")}
        if not found:
            return None
        read_json(found[max(found)] / TRAINER_STATE)  # which the Trainer reads first
        return found[max(found)]

    def is_due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return time.monotonic() - self._saved_at >= max(self._interval_s, self._cost_s / LARGEST_SHARE)

    def save(self) -> None:
        """Write a checkpoint after an optimiser step; only then are the older ones removed.

        Weights that are not finite are not saved: the training has diverged, and its last good checkpoint stays.
        """
        from safetensors.torch import save_file

        trainer, started = self._trainer, time.monotonic()
        if self._saved_step == trainer.state.global_step or not self._is_finite():
            return
        weights = {f"weight.{name}": p.detach() for name, p in self._trained.items()}
        state = trainer.optimizer.state_dict()
        moments, numbers = _flat(state["state"])
        scaler = getattr(trainer.accelerator, "scaler", None)
        target = self._folder / f"checkpoint-{trainer.state.global_step}"
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        good = {f"good.{name}": weight for name, weight in self._good.weights.items()} if self._good else {}
        save_file(_unshared({**weights, **moments, **good}), partial / "state.safetensors")
        write_json(
            partial / "state.json",
            {
                "optimiser": {"numbers": numbers, "groups": state["param_groups"]},
                "scheduler": trainer.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "rng": random_state(),
                "epoch_rng": self._epoch_rng,
            },
        )
        trainer.state.save_to_json(str(partial / TRAINER_STATE))
        for name in ("state.safetensors", TRAINER_STATE):
            with (partial / name).open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for older in self._folder.glob("checkpoint-*"):
            if older != target:
                shutil.rmtree(older, ignore_errors=True)
        self._saved_at, self._saved_step = time.monotonic(), trainer.state.global_step
        self._cost_s = self._saved_at - started

    def _is_finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self._trained.values())

    def restore(self, checkpoint: Path) -> None:
        """Restore weights, optimiser and scheduler; random states follow when the Trainer reaches their position.

        Raises ModelError if the checkpoint cannot be read or is another model's.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        trainer = self._trainer
        try:
            tensors, state = load_file(checkpoint / "state.safetensors"), read_json(checkpoint / "state.json")
            for name, parameter in self._trained.items():
                parameter.data.copy_(tensors.pop(f"weight.{name}"))
                if self._good:
                    self._good.weights[name] = tensors.pop(f"good.{name}")
            values = _nested(tensors, state["optimiser"]["numbers"])
            trainer.optimizer.load_state_dict({"state": values, "param_groups": state["optimiser"]["groups"]})
            trainer.lr_scheduler.load_state_dict(state["scheduler"])
            if state["scaler"] is not None:
                trainer.accelerator.scaler.load_state_dict(state["scaler"])
            self._to_restore = {"now": state["rng"], "epoch": state["epoch_rng"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"the checkpoint {checkpoint} is damaged ({type(error).__name__}); remove it, and the same command "
                "trains this stage from the beginning"
            ) from error

    def epoch_begins(self) -> None:
        """Before an epoch's order is drawn: remember the random state that draws it, or restore it."""
        if self._to_restore:
            epoch = self._trainer.state.epoch
            if epoch == int(epoch):  # the checkpoint was written at an epoch's end
                set_random_state(self._to_restore["now"])
                self._to_restore = {}
            else:
                set_random_state(self._to_restore["epoch"])
        self._epoch_rng = random_state()

    def step_begins(self) -> None:
        """Before the first step after the checkpoint: restore the random state of that moment."""
        if self._to_restore:
            set_random_state(self._to_restore["now"])
            self._to_restore = {}


def random_state() -> dict[str, Any]:
    """Return the states of all random number generators as JSON would hold them."""
    import numpy as np
    import torch

    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    import numpy as np
    import torch

    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _flat(values: dict[int, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split an optimiser's state, by weight and name, into tensors under one key each, and values for JSON."""
    tensors: dict[str, Any] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, state in values.items():
        for name, value in state.items():
            if hasattr(value, "detach"):
                tensors[f"optimiser.{index}.{name}"] = value.detach()
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, numbers


def _nested(tensors: dict[str, Any], numbers: dict[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Undo `_flat`."""
    values = {int(index): dict(state) for index, state in numbers.items()}
    for key, tensor in tensors.items():
        _, index, name = key.split(".", 2)
        values.setdefault(int(index), {})[name] = tensor
    return values


def _unshared(tensors: dict[str, Any]) -> dict[str, Any]:
    """Give each tensor memory of its own, as safetensors asks: bitsandbytes' quantiles are shared by all weights."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return result
