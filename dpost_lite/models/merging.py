"""Merge a LoRA adapter into its base one tensor at a time, so that no model has to fit in memory.

The result is that of `adapters.load_merged` (peft's merge, of the dequantised base if the recipe has a 4-bit
one), but the sum is kept in float32 for whoever rounds it next.
"""

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dpost_lite.errors import ModelError
from dpost_lite.models import hardware
from dpost_lite.recipe import ModelRecipe
from dpost_lite.runs.folder import read_json

_PREFIX = "base_model.model."
# settings of peft that change the sum, and their values without effect
_PLAIN = {
    "peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip

# Embedding and head stay in 16 bit, and so do T5's position biases and `wo`, the last linear layer of its blocks.
_QUANTISED = re.compile(r"\.layers\.|\.block\..*\.(q|k|v|o|wi|wi_0|wi_1)\.weight$")


def is_plain_lora(adapter_dir: Path) -> bool:
    """Whether an adapter is weight + scale·B·A and no more, which is what `TensorMerge` can add."""
    config = read_json(adapter_dir / "adapter_config.json")
    return all((config.get(key) or value) == value for key, value in _PLAIN.items())


class Adapter:
    """The tensors of a plain LoRA adapter, read when asked for.

    Raises ModelError if its weights are missing, or are not those of LoRA on linear layers.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        config = read_json(folder / "adapter_config.json")
        try:
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            self.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(
                f"the adapter {folder}: adapter_config.json has no usable r and lora_alpha; copy or train it again"
            ) from error
        self.folder = folder
        file = folder / "adapter_model.safetensors"
        if not file.is_file():  # a pickle, perhaps
            raise ModelError(f"the adapter {folder} has no adapter_model.safetensors; pickles are never read")
        try:
            self._file = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the adapter {folder} is damaged ({error}); copy or train it again") from error
        keys = set(self._file.keys())
        self.names = sorted(
            key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") + ".weight"
            for key in keys
            if key.endswith(".lora_A.weight")
        )
        """The base's tensors that it changes."""
        if keys != {self._key(name, part) for name in self.names for part in "AB"}:
            raise ModelError(
                f"the adapter {folder} has tensors that are not LoRA's on linear layers; merge it elsewhere"
            )

    def factors(self, name: str) -> tuple[Any, Any]:
        """Return A (rank, inputs) and B (outputs, rank) for one of `names`, in float32."""
        first, second = (self._file.get_tensor(self._key(name, part)).float() for part in "AB")
        return first, second

    def _key(self, name: str, part: str) -> str:
        return f"{_PREFIX}{name.removesuffix('.weight')}.lora_{part}.weight"


class TensorMerge:
    """A function from the name and values of a base's tensor to the merged values.

    With a 4-bit base its linear layers are quantised and dequantised first, as in training. Without an adapter, nothing
    is added. What an adapter changes comes back in float32, the rest in the compute type (4-bit base) or as stored.
    Raises ModelError if the adapter belongs to a base with other tensors.
    """

    def __init__(self, recipe: ModelRecipe, adapter_dir: Path | None) -> None:
        self._compute = hardware.compute_dtype(recipe.compute_dtype, on="cpu") if recipe.precision == "4bit" else None
        self._adapter = Adapter(adapter_dir) if adapter_dir is not None else None

    def check(self, names: Collection[str]) -> None:
        """Raise ModelError unless the base, whose tensors are `names`, has all those that the adapter changes."""
        if self._adapter is not None and (missing := sorted(set(self._adapter.names) - set(names))):
            raise ModelError(
                f"the adapter {self._adapter.folder} is of another base: this one has no {missing[0]}; name the base "
                "with --model"
            )

    def __call__(self, name: str, values: Any) -> Any:
        if self._compute is not None:
            values = values.to(self._compute)
            if values.dim() == 2 and _QUANTISED.search(name):
                values = _through_nf4(values)
        if self._adapter is None or name not in self._adapter.names:
            return values
        first, second = self._adapter.factors(name)
        if values.shape != (second.shape[0], first.shape[1]):
            raise ModelError(
                f"the adapter {self._adapter.folder} is of another base: its {name} is not of this size; name the base "
                "with --model"
            )
        return values.float().addmm_(second, first, alpha=self._adapter.scale)


def _through_nf4(values: Any) -> Any:
    """Quantise to 4 bits and back, as `loading.nf4` does."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(values.contiguous(), compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)
