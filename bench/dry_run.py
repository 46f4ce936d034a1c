"""Does the planner count what a step allocates? The real steps on fake tensors, which have a shape and no values.

    python bench/dry_run.py [key=value …] [--bases NAME …] [--gpu-mem 24GB] [--save FILE.json]

Needs neither weights nor a GPU. Our trainers' loss with trl's tiles and checkpointing, our engine's prefill and decode,
and what an export does with a model (merge, cast, its own probabilities) run as in a stage; every storage counts from
its allocation to its end. What a CPU cannot stand in for is replaced by code that allocates as much: bitsandbytes'
product (the dequantised weight, forward and backward), the memory-efficient attention (output and log-sum-exp), trl's
Triton kernels (nothing, they work in place), and reading an adapter's file. Not counted on either side: the CUDA
context, fragmentation, reading a base's files and, as no step of the optimiser is made, its moments.

Each model is cut to 1 and 2 layers (for sampling, 2 and 3), from which its own number is extrapolated: memory grows by
the layer. On CPUs, where little needs replacing, the rehearsal's training is counted in both compute types. One thing
is counted that PyTorch does not allocate: it adds the two gradients of an embedding that is also the head in place, but
not under fake tensors. That is the peak in full precision with small micro-batches only.

For a decode step it also counts the bytes read and written by all operations and the operations themselves, beside the
bound: weights and cache read once. The last line is one JSON object.
"""

import argparse
import math
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from publish import publish, result_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from dpost_lite.errors import ModelError
from dpost_lite.models import adapters, dpo, exact, loading, sft, training
from dpost_lite.models.family import ENCODER_DECODER, family_of_model
from dpost_lite.models.shapes import BASES, EncoderDecoderShape, ModelShape
from dpost_lite.planner.device import GIB, Device, card, parse_memory
from dpost_lite.planner.footprint import merge_parts, num_trained, written_part
from dpost_lite.planner.plan import make_plans
from dpost_lite.planner.workload import Workload, workload_of
from dpost_lite.recipe import Recipe
from dpost_lite.recipe_files import load_recipe
from dpost_lite.sampling import attention, choosing, model_runner
from dpost_lite.sampling.model_runner import ModelRunner
from dpost_lite.sampling.request import MAX_PREFILL_TOKENS, CacheSize, Request, logit_copies, max_prompts
from dpost_lite.sampling.statistics import Statistics
from dpost_lite.sampling.step_inputs import StepInputs, StepShape, multiple_of

BLOCK = 512  # bytes: PyTorch's GPU allocator rounds up to it
TRAINED_LAYERS, SAMPLED_LAYERS = (1, 2), (2, 3)  # with one, sampling may peak in a prefill where more peak in a step
CPUS = [Device("cpu", 16e9, number_bytes, 1e12, 1e10, "of no importance") for number_bytes in (2, 4)]
COMPUTE_TYPES = {2: torch.bfloat16, 4: torch.float32}
aten = torch.ops.aten
NOTHING_MOVED = {
    aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten._unsafe_view.default,
    aten.detach.default, torch.ops.prim.device.default,
}  # fmt: skip
TAKES_PART = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}
PUTS_PART = {aten.index_put_.default, aten._index_put_impl_.default}


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and of what all operations read and write.

    Operations whose result depends on values get a stand-in: a mask selects everything, a condition is false.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = weakref.WeakKeyDictionary()
        self.now = self.peak = self.moved = self.num_operations = 0

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it ends."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            num_bytes = self._known[storage] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += num_bytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, num_bytes)

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return args[0].dtype.is_floating_point * 1.0 if args[0].dtype != torch.bool else False
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            out = args[0].new_empty((args[1][0].numel(), *args[0].shape[args[1][0].dim() :]))
        else:
            out = func(*args, **(kwargs or {}))
        made = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        for tensor in made:
            self.hold(tensor)
        self._count(func, args, made)
        return out

    def _count(self, func: Any, args: Any, made: list[torch.Tensor]) -> None:
        """Count what an operation reads and writes: all of its tensors, or only what it takes of them."""
        if not made or func.is_view or func in NOTHING_MOVED:
            return
        if func in TAKES_PART:
            moved = [*made, *made]
        elif func in PUTS_PART:
            moved = [args[2], args[2]]
        else:
            moved = [*(t for t in tree_iter(args) if isinstance(t, torch.Tensor)), *made]
        self.moved += sum(map(_num_bytes, moved))
        self.num_operations += 1


def _num_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements, counted once where an expanded dimension repeats them."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.dtype.itemsize


class _Product4Bit(torch.autograd.Function):
    """Allocates as bitsandbytes' MatMul4Bit does."""

    @staticmethod
    def forward(ctx: Any, values: Any, packed: Any, num_outputs: int, num_inputs: int) -> Any:
        ctx.packed, ctx.size = packed, (num_outputs, num_inputs)
        return nn.functional.linear(values, values.new_empty(ctx.size))

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        return gradient @ gradient.new_empty(ctx.size), None, None, None


def _linear_4bit(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return a layer that peft takes for bitsandbytes' own, with as many bytes."""
    import bitsandbytes

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            number = linear.weight.numel()
            packed = nn.Parameter(torch.empty(number // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
            packed.compress_statistics, packed.quant_type = True, "nf4"
            self.weight, self.bias, self.compute_dtype = packed, linear.bias, dtype
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("scales", torch.empty(number // 64, dtype=torch.uint8, device="meta"))
            self.register_buffer("scales_of_scales", torch.empty(-(-number // (64 * 256)), device="meta"))

        def forward(self, values: Any) -> Any:
            out = _Product4Bit.apply(values.to(dtype), self.weight, self.out_features, self.in_features)
            return (out if self.bias is None else out + self.bias).to(values.dtype)

        def dequantized(self) -> Any:
            scales = torch.empty(self.weight.numel() * 2 // 64)  # in float32
            return scales.new_empty((self.out_features, self.in_features), dtype=dtype)

    return Linear4bit()


class _Attention(torch.autograd.Function):
    """Allocates as memory-efficient attention does, the one of PyTorch's that takes a mask."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        out = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
    return _Attention.apply(query, key, value, attn_mask)


def _kernel(_: torch.device, dtype: torch.dtype, *__: Any, **___: Any) -> attention.Kernel | None:
    """Return the fused kernel that a GPU has; its own call is counted, of which fake tensors need the shapes alone."""
    return None if dtype == torch.float32 else attention.memory_efficient


@contextmanager
def stand_ins(*, on_gpu: bool = True) -> Iterator[None]:
    """Replace what needs values or, `on_gpu`, a GPU, in a `with` block."""
    from transformers import Trainer
    from trl.kernels import chunked_logprob
    from trl.trainer import dpo_trainer

    from dpost_lite.models import seq2seq_trainers

    replaced: list[tuple[Any, str, Any]] = [
        (Trainer, "_move_model_to_device", lambda *_: None),
        (dpo_trainer, "hash_module", lambda *_: ""),  # of the weights
        (dpo_trainer.DPOTrainer, "_precompute_ref_logps", lambda _, rows, *__: rows),
        (
            seq2seq_trainers.DpoTrainer,
            "_with_reference",
            lambda _, policy, rows, micro: [{**row, "reference_logps": [0.0, 0.0]} for row in rows],
        ),
    ]
    if on_gpu:
        replaced += [
            (torch.nn.functional, "scaled_dot_product_attention", _attention),
            (chunked_logprob, "_forward_tile", lambda *_, **__: None),
            (chunked_logprob, "_backward_tile", lambda *_, **__: None),
            (chunked_logprob, "_addmm_fp32", lambda *_: None),  # on a GPU, of 16-bit numbers without a copy
            (chunked_logprob, "_use_triton", lambda _: False),
            (choosing, "_CPU_CHUNK", 2**62),  # a GPU takes all logits at once
            (model_runner, "kernel_for", _kernel),
        ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        yield


def build(shape: ModelShape, precision: str, dtype: torch.dtype) -> Any:
    """Return a model without memory (on the device "meta"), in 4 bit, 16 bit or float32."""
    config = shape.config()
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=torch.float32 if precision == "full" else dtype)
        if not shape.is_tied:  # transformers ties T5's until a checkpoint is loaded
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    if precision == "4bit":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith(".wo"):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, _linear_4bit(module, dtype))
        model.is_loaded_in_4bit = model.is_quantized = True
        config = SimpleNamespace(quant_method="bitsandbytes")
        model.hf_quantizer = SimpleNamespace(is_trainable=True, quantization_config=config)
    return model


def with_layers(shape: ModelShape, num_layers: int) -> ModelShape:
    """Return a shape with fewer layers; of an encoder–decoder, with so many on both sides."""
    if isinstance(shape, EncoderDecoderShape):
        return replace(shape, num_layers=num_layers, num_encoder_layers=num_layers)
    return replace(shape, num_layers=num_layers)


def give_shapes(model: Any, mode: FakeTensorMode) -> list[torch.Tensor]:
    """Make a model's tensors fake ones; return them."""
    made: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                        made[id(tensor)] = new
                    tensors[name] = made[id(tensor)]
    return list(made.values())


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def _trainer(name: str, policy: Any, recipe: Recipe, micro: int, length: int, folder: Path) -> Any:
    """Return the trainer of a stage with `micro` rows of `length` tokens."""
    prompter, family = SimpleNamespace(tokenizer=_tokenizer()), family_of_model(policy)
    limit = (recipe.dpo if name == "dpo" else recipe.sft).max_length
    num_answer = written_part(length, limit) if family is ENCODER_DECODER else length - length // 4
    prompt, answer = [0] * (length - num_answer), [0] * num_answer
    if name == "dpo":
        settings = recipe.dpo.model_copy(update={"micro_batch_size": micro, "batch_size": 2 * micro})
        rows = [family.dpo_row(prompt, (), answer, answer)] * micro
        return dpo.make_trainer(policy, prompter, rows, folder, settings, seed=0)
    settings = recipe.sft.model_copy(update={"micro_batch_size": micro, "batch_size": 2 * micro})
    rows = [family.sft_row(prompt, answer, answer)] * micro
    return sft.make_trainer(policy, prompter, rows, folder, settings, seed=0)


@dataclass(frozen=True, slots=True)
class Dry:
    """What was counted, in bytes: `peak` and, of a decode step, `moved` and the number of its operations."""

    peak: float
    moved: float = 0.0
    num_operations: float = 0.0

    def with_layers(self, other: "Dry", layers: tuple[int, int], num_layers: int) -> "Dry":
        """Return the same of a model with `num_layers`, where `self` and `other` have `layers`."""
        few, many = layers

        def line(a: float, b: float) -> float:
            return a + (b - a) * (num_layers - few) / (many - few)

        return Dry(
            line(self.peak, other.peak),
            line(self.moved, other.moved),
            line(self.num_operations, other.num_operations),
        )


def dry_training(name: str, recipe: Recipe, shape: ModelShape, device: Device, micro: int, length: int) -> Dry:
    """Return the peak of a step's second micro-batch, all rows of `length` tokens; `name` is sft or dpo."""
    few, many = (_dry_training(name, recipe, with_layers(shape, n), device, micro, length) for n in TRAINED_LAYERS)
    return few.with_layers(many, TRAINED_LAYERS, shape.num_layers)


def _dry_training(name: str, recipe: Recipe, shape: ModelShape, device: Device, micro: int, length: int) -> Dry:
    policy = build(shape, recipe.model.precision, COMPUTE_TYPES[device.number_bytes])
    with stand_ins(on_gpu=not device.is_cpu), tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            if recipe.model.precision != "full":
                policy = adapters.create(policy, recipe.lora, seed=0)
            trainer = _trainer(name, policy, recipe, micro, length, Path(folder))
        training.keep_float32(trainer.model)
        collated = trainer.data_collator([trainer.train_dataset[i] for i in range(micro)])
        mode, live = FakeTensorMode(), Live()
        held = give_shapes(trainer.model, mode)
        with mode, live:
            for tensor in held:
                live.hold(tensor)
            batch = {key: torch.empty(values.shape, dtype=values.dtype) for key, values in collated.items()}
            if (
                name == "dpo" and recipe.model.precision == "full" and "reference_logps" not in batch
            ):  # computed before the first step
                batch |= {f"ref_{side}_logps": torch.empty(micro) for side in ("chosen", "rejected")}
            if not device.is_cpu:
                trainer.model.gradient_checkpointing_enable({"preserve_rng_state": False, "use_reentrant": False})
            trainer.model.train()
            for weights in trainer.model.parameters():
                weights.grad = torch.empty_like(weights) if weights.requires_grad else None  # of an earlier micro-batch
            training.backward(trainer, batch, times=1)
    return Dry(live.peak)


def dry_sampling(
    recipe: Recipe, shape: ModelShape, work: Workload, device: Device, num_rows: int, *, is_merged: bool
) -> Dry:
    """Return the peak of a full prefill and of a decode step at the end of all rows, and the traffic of the latter."""
    cut = (with_layers(shape, n) for n in SAMPLED_LAYERS)
    few, many = (_dry_sampling(recipe, one, work, device, num_rows, is_merged=is_merged) for one in cut)
    return few.with_layers(many, SAMPLED_LAYERS, shape.num_layers)


def _dry_sampling(
    recipe: Recipe, shape: ModelShape, work: Workload, device: Device, num_rows: int, *, is_merged: bool
) -> Dry:
    section = recipe.sampling
    per_prompt = min(section.samples_for_pairs, section.samples_for_labels)
    num_prompts = min(work.num_train, max_prompts(num_rows, per_prompt))
    prompt_length, row_length = multiple_of(8, work.longest_prompt), multiple_of(8, section.max_new_tokens)
    size = CacheSize(num_prompts, prompt_length, num_rows, row_length, logit_copies(section.top_p))
    step = StepShape(
        num_rows=num_rows, num_extra=0, num_multi=0, multi_width=0, multi_length=0, num_prompts=num_prompts,
        prompt_width=1 << (per_prompt - 1).bit_length(), prompt_length=prompt_length,
        segments=((0, num_rows, row_length),),
    )  # fmt: skip
    model = build(shape, "16bit" if is_merged else recipe.model.precision, COMPUTE_TYPES[device.number_bytes])
    if not is_merged:
        with torch.device("meta"):
            model = adapters.create(model, recipe.lora, seed=0)
    mode, live = FakeTensorMode(), Live()
    held = give_shapes(model, mode)
    asked = Request(key="", prompt_ids=(0,) * prompt_length, stop_ids=frozenset())
    with stand_ins(), mode, live, torch.no_grad():  # in inference mode, parts of a product are not seen
        for tensor in held:
            live.hold(tensor)
        runner = ModelRunner(model, Statistics(), static=True)
        with runner.ready():
            runner.allocate(size)
            logits = runner.prefill([asked] * min(num_prompts, MAX_PREFILL_TOKENS // prompt_length), first_slot=0)
            live.moved = live.num_operations = 0
            numbers = sum(torch.Size(one).numel() for one in StepInputs.sizes(step).values())
            logits = runner._decode(torch.empty(numbers, dtype=torch.int64), step)
            moved, num_operations = live.moved, live.num_operations
            choosing.choose(
                logits, temperature=[section.temperature] * num_rows, top_k=[None] * num_rows,
                top_p=[section.top_p] * num_rows, seed=[0] * num_rows, step=[0] * num_rows,
            )  # fmt: skip
    return Dry(live.peak, moved, num_operations)


def dry_merging(recipe: Recipe, shape: ModelShape, work: Workload, device: Device) -> Dry:
    """Return the peak of an export: a policy is merged, cast to be saved, and gives a rationale's probabilities."""
    few, many = (_dry_merging(recipe, with_layers(shape, n), work, device) for n in TRAINED_LAYERS)
    return few.with_layers(many, TRAINED_LAYERS, shape.num_layers)


def _dry_merging(recipe: Recipe, shape: ModelShape, work: Workload, device: Device) -> Dry:
    is_full, dtype = recipe.model.precision == "full", COMPUTE_TYPES[device.number_bytes]
    model = build(shape, "16bit" if is_full else recipe.model.precision, dtype)
    mode, live = FakeTensorMode(), Live()

    def attach(base: Any, *_: Any, **__: Any) -> Any:
        attached = adapters.create(base, recipe.lora, seed=0)
        _read = [torch.empty_like(p) for p in attached.parameters() if p.requires_grad]  # by peft, all at once
        return attached

    replaced: list[tuple[Any, str, Any]] = [
        (adapters, "is_adapter", lambda _: not is_full),
        (adapters, "load", lambda *_, **__: model.eval()),
        (adapters, "attach", attach),
        (nn.Module, "to", lambda module, *_, **__: module),  # all is there
        (loading, "_dequantized", lambda layer: layer.dequantized()),
        (PreTrainedModel, "save_pretrained", lambda *_: None),
        (torch.Tensor, "numpy", lambda tensor: tensor),
        (torch.Tensor, "data_ptr", lambda _: 0),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        for tensor in give_shapes(model, mode):
            live.hold(tensor)
        del tensor
        with mode, live:
            model = adapters.load_merged(Path(), Path(), recipe.model)
            adapters.save_merged(model, SimpleNamespace(save_pretrained=lambda _: None), Path())
            prompt = work.longest_prompt
            exact.logits(model, [0] * (prompt + recipe.sampling.max_new_tokens), prompt)
    return Dry(live.peak)


def compare(recipe: Recipe, name: str, device: Device) -> list[dict[str, Any]]:
    """Return the planner's count beside the dry run for each stage of one base's plan; on a CPU, not for sampling."""
    work, shape = workload_of(recipe), BASES[name].shape
    device = device.computing(recipe.model.compute_dtype)
    (plan,) = make_plans([(recipe, work)], shape, device)
    rows = []
    for stage in plan.stages:
        parts = {part: num_bytes for part, num_bytes in stage.parts.items() if part != "reserve"}
        choices, on = stage.choices, device
        if stage.name in ("sft", "dpo"):
            micro, length = int(choices["micro-batch"]), int(choices["longest"])
            found = dry_training(stage.name, recipe, shape, device, micro, length)
            parts["optimiser"] = num_trained(recipe, shape) * 4.0  # the gradient; no step is made
        elif stage.name == "sampling" and not device.is_cpu:
            is_merged = choices["weights"] == "merged"
            found = dry_sampling(recipe, shape, work, device, int(choices["rows"]), is_merged=is_merged)
        elif stage.name == "merge, export":
            on = device if parts else CPUS[0]  # where the GPU has no room for merged weights
            parts, found = merge_parts(recipe, shape, on), dry_merging(recipe, shape, work, on)
        else:
            continue
        row = {"base": name, "device": name_of(on), "stage": stage.name, "choices": choices, "parts": parts}
        rows.append({**row, "planned": sum(parts.values()), "found": found.peak})
        if stage.name == "sampling":
            bound = parts["weights"] + parts["cache"]
            rows[-1] |= {"moved": found.moved, "operations": found.num_operations, "bound": bound}
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    words = f"{row['base']:<28}{row['device']:>13}  {row['stage']:<14}"
    off = row["planned"] / row["found"] - 1
    words += f"{row['planned'] / GIB:8.2f}{row['found'] / GIB:8.2f}{off:+7.1%}"
    if "moved" in row:
        words += (
            f"   a step moves {row['moved'] / row['bound']:.2f} times the bound, {row['operations']:,.0f} operations"
        )
    return words


def main() -> None:
    """Compare, print one line a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES), metavar="NAME")
    parser.add_argument("--gpu-mem", default=None, help="a card for all bases; by default the smallest that holds each")
    parser.add_argument("--save", type=Path)
    parser.add_argument("overrides", nargs="*", help="recipe keys, key=value")
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(None, arguments.overrides)
    print(f"{'base':<28}{'device':>13}  {'stage':<14}{'planned':>8}{'dry GiB':>8}{'off':>7}")
    rows = []
    for name in arguments.bases:
        device = card(parse_memory(arguments.gpu_mem)) if arguments.gpu_mem else smallest_card(recipe, name)
        for row in compare(recipe, name, device):
            rows.append(row)
            print(line(row), flush=True)
    for device in CPUS:
        for row in compare(load_recipe("rehearsal", arguments.overrides), "HuggingFaceTB/SmolLM2-135M", device):
            rows.append(row)
            print(line(row), flush=True)
    publish(result_of("dry_run", rows=rows), arguments.save)


def name_of(device: Device) -> str:
    """Return `24 GB`, or the CPU's compute type."""
    kind = str(COMPUTE_TYPES[device.number_bytes]).removeprefix("torch.")
    return f"CPU, {kind}" if device.is_cpu else f"{device.memory_bytes / 1e9:.0f} GB"


def smallest_card(recipe: Recipe, name: str) -> Device:
    """Return the smallest usual card that holds a base."""
    for size in ("8GB", "12GB", "16GB", "24GB", "48GB"):
        try:
            device = card(parse_memory(size)).computing(recipe.model.compute_dtype)
            make_plans([(recipe, workload_of(recipe))], BASES[name].shape, device)
            return device
        except ModelError:
            continue
    return card(80e9)


if __name__ == "__main__":
    main()
