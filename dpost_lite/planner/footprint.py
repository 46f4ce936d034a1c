"""Bytes of each stage, counted tensor by tensor from the shape of the model.

A reserve covers what cannot be counted: the CUDA context or the process itself, and fragmentation.
"""

from dataclasses import dataclass
from importlib.metadata import version

from dpost_lite.methods import METHODS
from dpost_lite.models.shapes import EncoderDecoderShape, ModelShape
from dpost_lite.models.training import OPTIMISER_BYTES, optimiser
from dpost_lite.planner.device import CONTEXT_BYTES, GIB, Device
from dpost_lite.planner.workload import Workload
from dpost_lite.recipe import Recipe
from dpost_lite.sampling.request import MAX_PREFILL_TOKENS, logit_copies, max_prompts

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight's code, its block's 8-bit scale, that one's own scale (QLoRA, 3)
PROCESS_BYTES = 0.75 * GIB  # Python, PyTorch and the libraries
FRAGMENTATION = 0.06  # as a share of what is allocated
ADAPTER_FRAGMENTATION = 0.12  # the same where adapters are trained on a GPU: 6 to 23 %, median 12 (bench/README.md)
LENGTH_MARGIN = 1.1  # lengths are counted without the tokenizer
CHUNK_TOKENS, CHUNK_WORDS = 4096, 32_768  # of a tile of logits (trl 1.16)

# What trl's tiles take for each logit beside the tile itself, in which a GPU works: seven float32 copies and a mask.
TILE_BYTES = {"cuda": 0, "cpu": 7 * 4 + 1}

WRITTEN_SHARE = 0.85  # of the longest rows the decoder's: of GSM8K's longest, 440 of 518 tokens are the answer
LOGIT_BYTES_OF_T5 = 12  # for each logit: it, its logarithm and the gradient, in float32, or in float32 and 16 bit
SCORE_BYTES = 9  # for each attention score: it, and what dropout leaves of it and which

Parts = dict[str, float]


@dataclass(frozen=True, slots=True)
class Technique:
    """What else decides how much memory training takes: `own_technique` is dpost-lite's, bench/published.py counts
    those of others.
    """

    num_trained: int
    state_bytes: int
    """Bytes of optimiser state per trained weight."""
    recomputes: bool
    """Whether layers are computed again in the backward pass (checkpointing), or all that they need is kept."""
    in_chunks: bool
    """Whether logits are computed in tiles, or all at once."""


def weight_bytes(recipe: Recipe, shape: ModelShape, device: Device) -> float:
    """Bytes of weights under training: linear layers in 4 bit, the rest in the compute type, or all in float32."""
    number = 4 if recipe.model.precision == "full" else device.number_bytes
    linear = NF4_BYTES if recipe.model.precision == "4bit" else number
    return shape.num_linear * linear + (shape.num_parameters - shape.num_linear) * number


def num_trained(recipe: Recipe, shape: ModelShape) -> int:
    """Weights that are trained: LoRA's, or all."""
    return shape.num_parameters if recipe.model.precision == "full" else shape.num_lora(recipe.lora.rank)


def longest_row(name: str, recipe: Recipe, work: Workload, shape: ModelShape) -> int:
    """Tokens of the longest row that a training stage may see, prompt and answer together."""
    section = recipe.sft if name == "sft" else recipe.dpo
    num_limited = 2 if isinstance(shape, EncoderDecoderShape) else 1  # sides to which the limit applies
    sampled = work.longest_prompt + recipe.sampling.max_new_tokens
    longest = max(work.longest, sampled) if METHODS[recipe.method].has_rounds or name == "dpo" else work.longest
    return min(section.max_length * num_limited, int(longest * LENGTH_MARGIN))


def logits_in_chunks() -> bool:
    """Whether trl computes log-probabilities in tiles (1.15 and later), or holds all logits at once."""
    major, minor = map(int, version("trl").split(".")[:2])
    return (major, minor) >= (1, 15)


def own_technique(recipe: Recipe, shape: ModelShape, device: Device) -> Technique:
    """How models/training.py trains."""
    name = optimiser(on_gpu=not device.is_cpu, trains_adapter=recipe.model.precision != "full")
    return Technique(
        num_trained=num_trained(recipe, shape),
        state_bytes=OPTIMISER_BYTES[name],
        recomputes=not device.is_cpu,
        in_chunks=logits_in_chunks() and not isinstance(shape, EncoderDecoderShape),
    )


def training_parts(
    name: str,
    recipe: Recipe,
    shape: ModelShape,
    work: Workload,
    device: Device,
    micro: int,
    technique: Technique | None = None,
) -> Parts:
    """Bytes by part. SFT sees `micro` sequences per pass; DPO twice as many, through policy and frozen reference."""
    technique = technique or own_technique(recipe, shape, device)
    is_dpo, is_full = name == "dpo", recipe.model.precision == "full"
    number = 4 if is_full else device.number_bytes
    num_rows, length = micro * (2 if is_dpo else 1), longest_row(name, recipe, work, shape)
    trained, limit = technique.num_trained, (recipe.dpo if is_dpo else recipe.sft).max_length
    if isinstance(shape, EncoderDecoderShape):
        written = written_part(length, limit)
        held, logits = _held_of_t5(num_rows, length, written, shape, number, technique, drops_out=not is_dpo)
    else:
        held, logits = _held(num_rows * length, shape, device, number, technique, is_dpo=is_dpo)
    dequantised = 2 * number * max(i * o for i, o in shape.linear_sizes) if recipe.model.precision == "4bit" else 0
    return {
        "weights": weight_bytes(recipe, shape, device),
        "adapters": 0.0 if is_full else trained * 4.0 * (2 if is_dpo else 1),
        "optimiser": trained * (4.0 + technique.state_bytes),  # the gradient in float32, and two moments
        "activations": float(held + dequantised),
        "logits": logits,
    }


def _held(
    num_tokens: int, shape: ModelShape, device: Device, number: int, technique: Technique, *, is_dpo: bool
) -> tuple[float, float]:
    """Bytes of activations and logits that a pass over `num_tokens` holds at its peak, in numbers of `number` bytes."""
    is_full = technique.num_trained == shape.num_parameters
    # What a layer's gradient needs: both norms' inputs and outputs, which the layers behind them share, q, k and v with
    # k and v repeated for their heads, what o and down read, and gate, its activation and up.
    narrow, wide = shape.hidden + shape.num_heads * shape.head_dim, shape.intermediate
    logits = _logits(num_tokens, shape, device, number, technique, is_dpo=is_dpo)
    # Where embedding and head are one matrix, its gradient in the head is held until that in the embedding is there.
    shared = 4.0 * shape.num_embedding if is_full and shape.is_tied else 0.0
    if technique.recomputes:
        # Each layer's input is kept. Beside them are the logits or, once these are gone, one layer with its gradients:
        # whichever takes more. In 16 bit, norms and rotated keys are held in float32 too.
        layer: float = number * ((2 if number == 4 else 4) * narrow + 4 * wide)
        inputs = num_tokens * shape.num_layers * number * shape.hidden
        activations = inputs + max(0.0, shared + num_tokens * 2 * layer - logits)
    else:
        layer = number * 4.0 * (narrow + wide)
        layer += 12 * shape.hidden if number == 2 else 0  # what both norms hold in float32
        qk_norm = (shape.num_heads + shape.num_kv_heads) * shape.head_dim if shape.has_qk_norm else 0
        layer += 4.5 * qk_norm
        if is_full:  # the gradients of norms' weights need what these scale
            layer += 4 * (shape.num_norms * shape.hidden + qk_norm)
        activations = num_tokens * shape.num_layers * layer
    return max(activations, 2 * shared - logits), logits  # the embedding's gradient, added to the head's


def written_part(length: int, limit: int) -> int:
    """Return how many of an encoder–decoder's `length` tokens are the decoder's; `limit` holds for each side."""
    return min(limit, int(WRITTEN_SHARE * length))


def _held_of_t5(
    num_rows: int,
    length: int,
    written: int,
    shape: EncoderDecoderShape,
    number: int,
    technique: Technique,
    *,
    drops_out: bool,
) -> tuple[float, float]:
    """See `_held`. Rows have `length` tokens on both sides together, `written` in the decoder; all logits are held.

    The encoder and the decoder read different tokens, and dropout on attention keeps its scores.
    """
    read, tokens = num_rows * (length - written), num_rows * written
    attended = shape.hidden + shape.num_heads * shape.head_dim  # once in the encoder's layers, twice in the decoder's
    encoder, decoder = attended + shape.intermediate, 2 * attended + shape.intermediate
    scores = num_rows * shape.num_heads * SCORE_BYTES * drops_out
    of_encoder, of_decoder = scores * (length - written) ** 2, scores * written * length
    logits = float(LOGIT_BYTES_OF_T5 * tokens * shape.vocabulary)
    in_float32 = 16 * shape.hidden if number == 2 else 0  # what norms hold
    dropped = (number + 1) * (3 * shape.hidden + shape.intermediate) * drops_out  # results and masks
    of_encoder += read * (6 * number * encoder + in_float32 + dropped)
    of_decoder += tokens * (6 * number * decoder + in_float32 + dropped)
    if not technique.recomputes:
        return shape.num_encoder_layers * of_encoder + shape.num_layers * of_decoder, logits
    inputs = number * shape.hidden * (read * shape.num_encoder_layers + tokens * shape.num_layers)
    inputs += 16 * shape.hidden * (read + tokens)  # what the norms behind both stacks hold
    return inputs + max(0.0, of_decoder - logits), logits


def _logits(
    num_tokens: int, shape: ModelShape, device: Device, number: int, technique: Technique, *, is_dpo: bool
) -> float:
    if technique.in_chunks:
        tile = min(num_tokens, CHUNK_TOKENS) * min(shape.vocabulary, CHUNK_WORDS)
        gradients = num_tokens * shape.hidden * (4 + number)  # of what the head reads, and of the head
        gradients += 4 * shape.vocabulary * shape.hidden if technique.num_trained == shape.num_parameters else 0
        return float(tile * (number + TILE_BYTES[device.kind]) + gradients)
    policy = num_tokens * shape.vocabulary * (number + 4 + 4 + number)  # logits, float32, and both gradients
    return float(policy + (num_tokens * shape.vocabulary * (number + 4) if is_dpo else 0))  # the reference's beside it


def sampling_parts(
    recipe: Recipe, shape: ModelShape, work: Workload, device: Device, *, is_merged: bool, num_rows: int
) -> Parts:
    """Bytes by part: weights, the cache of all rows and their prompts, and what the largest prefill needs."""
    section, number = recipe.sampling, device.number_bytes
    num_samples = min(section.samples_for_pairs, section.samples_for_labels)
    prompts = min(work.num_train, max_prompts(num_rows, num_samples))
    graphs = not device.is_cpu  # they take one row more, for padding, and a place for their logits
    row = section.max_new_tokens + isinstance(shape, EncoderDecoderShape)  # whose answers begin with a token more
    positions = (num_rows + graphs) * row + prompts * int(work.longest_prompt * LENGTH_MARGIN)
    inputs, outputs = (sum(size[i] for size in shape.linear_sizes) for i in (0, 1))
    lora = shape.num_lora(recipe.lora.rank)
    packed_head = number * shape.num_embedding if device.is_cpu and shape.is_tied else 0
    merged = float(number * shape.num_parameters + packed_head)
    return {
        "weights": merged if is_merged else weight_bytes(recipe, shape, device),
        "adapters": 0.0 if is_merged else 4.0 * lora,
        "activations": float(MAX_PREFILL_TOKENS * number * (inputs + outputs + 4 * shape.hidden)),
        "logits": float(num_rows * shape.vocabulary * (4 * logit_copies(section.top_p) + graphs * number)),
        "cache": float(number * positions * shape.cache_position_values),
    }


def merge_parts(recipe: Recipe, shape: ModelShape, device: Device) -> Parts:
    """Bytes by part: the merged policy, and the most that merging it, saving it, or proving its export takes beside."""
    number, embedding = device.number_bytes, shape.vocabulary * shape.hidden
    merging = 0.0
    if recipe.model.precision != "full":  # the adapter, and its file or a layer's update, twice in float32
        adapter = 4.0 * shape.num_lora(recipe.lora.rank)
        merging = adapter + max(adapter, 2 * 4.0 * max(i * o for i, o in shape.linear_sizes))
    saving = float(number * embedding)  # the absolute values of the largest weight
    # The policy's own probabilities of a rationale: weights in 16 bit, the head and the logits in float32.
    proving = 4.0 * (embedding + shape.vocabulary * recipe.sampling.max_new_tokens)
    proving -= (number - 2) * shape.num_parameters
    return {"weights": float(number * shape.num_parameters), "activations": max(merging, saving, proving)}


def with_reserve(parts: Parts, device: Device, fragmentation: float = FRAGMENTATION) -> Parts:
    """Return the parts plus the reserve."""
    fixed = PROCESS_BYTES if device.is_cpu else CONTEXT_BYTES
    return {**parts, "reserve": fixed + fragmentation * sum(parts.values())}


def training_fragmentation(recipe: Recipe, device: Device) -> float:
    """Share of what training allocates that PyTorch holds on top and cannot use."""
    trains_adapter = recipe.model.precision != "full"
    return ADAPTER_FRAGMENTATION if trains_adapter and not device.is_cpu else FRAGMENTATION
