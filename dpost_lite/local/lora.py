"""Write a LoRA adapter as a GGUF file, which llama.cpp adds to the file of its base when it loads it (`--lora`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError
from dpost_lite.local.config import FAMILIES, read_config
from dpost_lite.local.gguf import names_in_gguf, permuted

Factors = Callable[[str], tuple[Any, Any]]  # a tensor's name in transformers -> A (rank, inputs), B (outputs, rank)


def write_lora(model_dir: Path, out: Path, *, names: Sequence[str], factors: Factors, scale: float) -> Path:
    """Write the changes scale·B·A of the tensors `names` of the base in `model_dir` as `out`, in float32; return `out`.

    Raises ExportError if the base has no such tensors, or `out` cannot be written.
    """
    from gguf import GGUFType, GGUFWriter, Keys

    config = read_config(model_dir)
    in_gguf = names_in_gguf(model_dir, config)
    if missing := [name for name in names if name not in in_gguf]:
        raise ExportError(f"{model_dir} has no {missing[0]}, which the adapter changes; name its base with --model")
    partial = out.with_name(out.name + ".partial")
    try:
        writer = GGUFWriter(partial, FAMILIES[config["model_type"]])
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        for i, name in enumerate(names):
            first, second = factors(name)
            if i == 0:  # llama.cpp divides by the rank
                writer.add_float32(Keys.Adapter.LORA_ALPHA, scale * first.shape[0])
            writer.add_tensor(f"{in_gguf[name]}.lora_a", first.contiguous().numpy())
            writer.add_tensor(f"{in_gguf[name]}.lora_b", permuted(config, name, second).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(out)
    except OSError as error:
        raise ExportError(f"{out} cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)
    return out
