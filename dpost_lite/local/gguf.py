"""Export a model folder as a GGUF file: a writer for the families of `config.FAMILIES`, and quantisation.

llama.cpp's converter is not available from PyPI, so the families that dpost-lite trains are written here with the
`gguf` package. Tensors are read, merged, cast and written one at a time: beyond what the libraries take, at most three
times the largest tensor in float32 is in use, whatever the size of the model; five times if an adapter was trained on a
4-bit base, whose layers are quantised to 4 bits and back first (tests/test_merging.py).

`export` has llama.cpp quantise the file and test it on a probe text, each in a child process (`quantize.py`,
`trial.py`). A file whose token ids differ from the trained tokenizer's is refused: it would run, but answer worse.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dpost_lite.errors import ExportError
from dpost_lite.local import gemma3, llama, t5
from dpost_lite.local.config import FAMILIES, read_config, rope_factors, write_config
from dpost_lite.local.vocabulary import Vocabulary, read_vocabulary

Dtype = Literal["f16", "bf16", "f32", "q8_0"]
Change = Callable[[str, Any], Any]  # a tensor's name and stored values -> those to write
Quant = Literal["q4_k_m", "q5_k_m", "q6_k", "q8_0", "f16"]
QUANTS: tuple[Quant, ...] = get_args(Quant)
Check = Callable[[Path, Path], None]  # of the 16-bit file and the quantised one; raises ExportError

FORMAT_KEYS = ("solutions", "sandbox")  # in the file's metadata, after "dpost_lite.", if its solutions hold code
POLICY_KEY = "policy"  # as well: a digest of what was exported
_PERMUTED = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
_MAX_F16 = 65504.0
_LARGEST = {"f16": _MAX_F16, "q8_0": 127 * _MAX_F16}  # of q8_0, each block of 32 weights has a scale in float16
_BLOCK = 32
_CHUNK = 2**22  # weights that are quantised at a time
# bytes per weight, rounded up; llama.cpp stores tensors whose rows are not a multiple of 256 in a wider type
_WEIGHT_BYTES = {"q4_k_m": 0.75, "q5_k_m": 0.9, "q6_k": 1.1, "q8_0": 1.1, "f16": 2.0, "bf16": 2.0, "f32": 4.0}
_HEAD_BYTES = 2**24  # vocabulary and metadata


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its file and name in the model folder, and its name in GGUF."""

    file: Path
    source: str
    name: str
    shape: tuple[int, ...]
    stored: str  # dtype as named by safetensors

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


def export(model_dir: Path, out: Path, *, quant: Quant, check: Check | None = None) -> Path:
    """Write the model in `model_dir` as the quantised GGUF file `out`, tested with llama.cpp; return `out`.

    `check` gets the 16-bit file and the quantised one before `out` is there. Nothing is left behind on failure. Raises
    ExportError if the model is unsupported or damaged, the disk is full, or the file fails its test; and as `check`.
    """
    with source_file(model_dir, out, (quant,)) as source:
        return quantize(model_dir, source, out, quant, check)


@contextmanager
def source_file(model_dir: Path, out: Path, quants: Sequence[Quant]) -> Iterator[Path]:
    """Write the model in 16 bit as a GGUF file beside `out`, to be quantised to `quants`; delete it afterwards.

    Weights stored in bfloat16 stay bfloat16 unless they are wanted as f16, others are float16, so nothing is lost
    before quantisation. T5's are never bfloat16, which would round all activations too. Raises ExportError as `export`.
    """
    tensors = _read_tensors(model_dir, config := read_config(model_dir))
    keeps_bf16 = config["model_type"] != t5.MODEL_TYPE and "f16" not in quants
    source_dtype: Dtype = "bf16" if keeps_bf16 and any(t.stored == "BF16" for t in tensors) else "f16"
    widths = {source_dtype, *quants}  # source and results exist side by side for a while
    check_disk(out, sum(_num_bytes(tensors, width) for width in widths))
    read_vocabulary(model_dir, config)  # refuse a tokenizer before the weights are written
    source = _temporary(out, ".source")
    try:
        yield write_gguf(model_dir, source, dtype=source_dtype)
    finally:
        source.unlink(missing_ok=True)


def quantize(model_dir: Path, source: Path, out: Path, quant: Quant, check: Check | None = None) -> Path:
    """Quantise a `source_file` into `out` and test it with llama.cpp; return `out`. f16 takes `source` as it is.

    `check` as in `export`. Nothing is left behind on failure. Raises ExportError as `export`.
    """
    partial = _temporary(out, ".partial")
    try:
        if quant == "f16":
            source.replace(partial)
            source = partial
        vocabulary = read_vocabulary(model_dir, read_config(model_dir))
        _quantize_and_check(source, partial, quant, vocabulary)
        if check is not None:
            check(source, partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def farthest_tensor(file: Path, model_dir: Path) -> tuple[str, float]:
    """Return the model's tensor that a GGUF file, quantised or not, holds least exactly, and its relative error.

    The error is the norm of the difference over the norm of the model's tensor; a tensor that the file lacks has 1.
    """
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config = read_config(model_dir)
    tensors = _read_tensors(model_dir, config)
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    errors = {}
    for tensor, expected in zip(tensors, _arrays(config, tensors, "f32"), strict=True):
        found = stored.get(tensor.name)
        values = 0.0 if found is None else dequantize(found.data, found.tensor_type).reshape(expected.shape)
        errors[tensor.source] = float(np.linalg.norm(values - expected) / (np.linalg.norm(expected) or 1.0))
    return max(errors.items(), key=lambda item: item[1])


def write_gguf(
    model_dir: Path,
    out: Path,
    *,
    dtype: Dtype = "f16",
    tokenizer_dir: Path | None = None,
    change: Change | None = None,
    noted: Mapping[str, str] | None = None,
) -> Path:
    """Write the safetensors model in `model_dir` as the GGUF file `out`, without llama.cpp; return `out`.

    Matrices are written as `dtype`, vectors as float32. The file is written atomically. The tokenizer is that of
    `tokenizer_dir`, or the model's own; `change` merges an adapter (models/merging.py); `noted` are values of
    FORMAT_KEYS and POLICY_KEY. Raises ExportError if the architecture, tokenizer, rotary scaling or a tensor is
    unsupported, weights overflow `dtype`, or the disk is full.
    """
    config = {**read_config(model_dir), **{f"dpost_lite_{key}": value for key, value in (noted or {}).items()}}
    tensors = _read_tensors(model_dir, config)
    vocabulary = read_vocabulary(tokenizer_dir or model_dir, config)
    check_disk(out, _num_bytes(tensors, dtype))
    partial = _temporary(out, ".partial")
    try:
        _write(partial, config, tensors, vocabulary, dtype, change)
        partial.replace(out)
    except OSError as error:
        raise ExportError(f"{out} cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def names_in_gguf(model_dir: Path, config: dict[str, Any] | None = None) -> dict[str, str]:
    """Return the names of a model's tensors: transformers' -> GGUF's. Raises ExportError as `export` does."""
    return {tensor.source: tensor.name for tensor in _read_tensors(model_dir, config or read_config(model_dir))}


def check_disk(path: Path, needed_bytes: int) -> None:
    """Raise ExportError unless the disk of `path`, whose folder may not exist yet, has `needed_bytes` free."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ExportError(
            f"{path}: the export needs {needed_bytes / 2**30:.2f} GiB, the disk has {free_bytes / 2**30:.2f} GiB free; "
            "free some space, or export to another disk"
        )


def _num_bytes(tensors: list[_Tensor], dtype: Dtype | Quant) -> int:
    """Return the size of a file, rounded up."""
    kinds = ("f32" if t5.stays_float32(tensor.name, dtype) else dtype for tensor in tensors)
    weights = sum(tensor.num_weights * _WEIGHT_BYTES[kind] for tensor, kind in zip(tensors, kinds, strict=True))
    return int(weights) + _HEAD_BYTES


def _temporary(out: Path, suffix: str) -> Path:
    """Return the path of a temporary file next to `out`, creating the folder if necessary."""
    if out.is_dir():
        raise ExportError(f"{out} is a folder; give the file to write, ending in .gguf")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{out.parent} cannot be created ({error.strerror}); choose another folder") from error
    return out.with_name(out.name + suffix)


def _read_tensors(model_dir: Path, config: dict[str, Any]) -> list[_Tensor]:
    """List the folder's tensors from the headers of its safetensors files, without reading weights."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map
    from safetensors import SafetensorError, safe_open

    arch = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == FAMILIES[config["model_type"]])
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors = []
    for file in sorted(model_dir.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for source in weights.keys():  # noqa: SIM118 - not a dict
                    is_copy = source == "lm_head.weight" and config.get("tie_word_embeddings")
                    if source.endswith("rotary_emb.inv_freq") or is_copy or source in t5.COPIES:
                        continue
                    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                    part = weights.get_slice(source)
                    if name is None or part.get_dtype() not in ("F32", "F16", "BF16"):
                        raise ExportError(
                            f"{file}: tensor {source} ({part.get_dtype()}) is not supported in a GGUF "
                            f"{config['model_type']}; export merged 16- or 32-bit weights"
                        )
                    tensors.append(_Tensor(file, source, name, tuple(part.get_shape()), part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{file} cannot be read ({error}); save or download it again") from error
    has_head = any(tensor.name == t5.HEAD for tensor in tensors)
    if config["model_type"] == t5.MODEL_TYPE and (t5.is_scaled(config) or not has_head):
        tensors += [replace(tensor, name=t5.HEAD) for tensor in tensors if tensor.source == t5.EMBEDDING]
    found = {tensor.name for tensor in tensors}
    needed = {"token_embd.weight", *(() if config.get("tie_word_embeddings") else ("output.weight",))}
    if missing := sorted(needed - found):
        raise ExportError(f"{model_dir}: model*.safetensors lack {', '.join(missing)}; save or download it again")
    return tensors


def _write(
    partial: Path,
    config: dict[str, Any],
    tensors: list[_Tensor],
    vocabulary: Vocabulary,
    dtype: Dtype,
    change: Change | None = None,
) -> None:
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[dtype]
    writer = GGUFWriter(partial, FAMILIES[config["model_type"]])
    try:
        writer.add_name(partial.name.split(".")[0])
        writer.add_file_type(LlamaFileType[file_type])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        write_config(writer, config)
        for key in (*FORMAT_KEYS, POLICY_KEY):
            if value := config.get(f"dpost_lite_{key}"):
                writer.add_string(f"dpost_lite.{key}", value)
        vocabulary.write(writer)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            _announce(writer, tensor, _kind(tensor, dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for array in _arrays(config, tensors, dtype, change):
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _kind(tensor: _Tensor, dtype: Dtype) -> Dtype:
    """Return the type a tensor is written in: like llama.cpp, vectors in float32, and float16 where q8_0 cannot be."""
    if len(tensor.shape) == 1 or t5.stays_float32(tensor.name, dtype):
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % _BLOCK else dtype


def _announce(writer: Any, tensor: _Tensor, kind: Dtype) -> None:
    """Add a tensor's name, shape and type to the header; the writer takes the shape of quantised ones in bytes."""
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    raw = GGMLQuantizationType[kind.upper()]
    in_bytes = quant_shape_to_byte_shape(tensor.shape, raw)
    shape, holds = (in_bytes, np.uint8) if kind == "q8_0" else (tensor.shape, np.float32)
    writer.add_tensor_info(tensor.name, shape, np.dtype(holds), math.prod(in_bytes), raw_dtype=raw)


def _arrays(
    config: dict[str, Any], tensors: list[_Tensor], dtype: Dtype, change: Change | None = None
) -> Iterator[Any]:
    """Yield each tensor in GGUF's layout and type, one at a time."""
    for tensor in tensors:
        yield _array(config, tensor, _kind(tensor, dtype), change)


def _array(config: dict[str, Any], tensor: _Tensor, kind: Dtype, change: Change | None) -> Any:
    """Return a tensor in GGUF's layout and type. Raises ExportError if it is outside the type's range."""
    import torch
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as weights:
        values = weights.get_tensor(tensor.source)
    if change is not None:
        values = change(tensor.source, values)
    values = permuted(config, tensor.source, values)
    if config["model_type"] == gemma3.MODEL_TYPE and gemma3.is_stored_less_one(tensor.source):
        values = values.float() + 1
    if tensor.name == t5.HEAD and t5.is_scaled(config):
        values = values.float() * t5.head_scale(config)
    if kind == "f32":
        return values.float().numpy()
    if kind == "bf16":
        return values.bfloat16().contiguous().view(torch.int16).numpy()
    if max(-float(values.min()), float(values.max())) > _LARGEST[kind]:
        raise ExportError(
            f"{tensor.source} has values outside float16's range; save it in bfloat16 and export q8_0 or smaller"
        )
    return values.half().numpy() if kind == "f16" else _as_q8_0(values)


def _as_q8_0(values: Any) -> Any:
    """Quantise a matrix as llama.cpp does, bit by bit, a few rows at a time."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = max(1, _CHUNK // values.shape[1])
    return np.concatenate([quantize(part.float().numpy(), GGMLQuantizationType.Q8_0) for part in values.split(rows)])


def permuted(config: dict[str, Any], source: str, values: Any) -> Any:
    """Return a tensor's rows in llama.cpp's order, given its name in transformers.

    In q and k (heads * head_dim, …) of its Llama, adjacent pairs are rotated; in transformers the halves of a head.
    """
    if FAMILIES[config["model_type"]] != "llama" or not source.endswith(_PERMUTED):
        return values
    num_heads = config["num_attention_heads"]
    if source.rpartition("_proj")[0].endswith("k"):
        num_heads = config.get("num_key_value_heads") or num_heads
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).transpose(1, 2).reshape(values.shape).contiguous()


def _quantize_and_check(source: Path, partial: Path, quant: Quant, vocabulary: Vocabulary) -> None:
    """Quantise `source` into `partial` unless they are one, test it, and compare its token ids with the tokenizer's."""
    if source != partial:
        child = llama.run_module("dpost_lite.local.quantize", str(source), str(partial), quant)
        if child.returncode != 0:
            if shutil.disk_usage(partial.parent).free < _HEAD_BYTES:
                raise ExportError(f"the disk is full: the {quant} file does not fit; free some space")
            raise ExportError(
                f"llama.cpp could not quantise to {quant} ({llama.ended_by(child.returncode)}): "
                f"{llama.last_lines(child.stderr)}; choose another type, such as f16, which is not quantised"
            )
    text = vocabulary.prompt(llama.PROBE)
    _, ids = llama.try_file(partial, text)
    expected = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    if ids != expected:
        at = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), len(ids))
        raise ExportError(
            f"{vocabulary.path}: llama.cpp tokenises the probe text differently from token {at} on, so it would answer "
            "worse; train from a base model with a supported tokenizer"
        )
