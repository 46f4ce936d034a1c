"""What is checked of a GPU's results: each check compares two ways to compute the same on a tiny Llama.

A check is a function of the device and of a folder for its files; it returns an `Outcome`, or None if another process
goes on with the folder. What only a GPU has is "not applicable" on a CPU. Libraries are imported inside the functions,
since unsloth must be the first in its process. gpu_check.py runs the checks and says what a failure costs.
"""

import importlib.util
import math
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpost_lite.models import hardware
from dpost_lite.models.backend import Backend
from dpost_lite.models.shapes import ModelShape
from dpost_lite.recipe import ModelRecipe, Recipe
from dpost_lite.runs.folder import read_json, write_json
from dpost_lite.system.gpu_record import State
from dpost_lite.system.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch

    from dpost_lite.sampling.request import Completion, Request

SHAPE = ModelShape(
    name="tiny", num_layers=2, hidden=256, intermediate=704, num_heads=4, num_kv_heads=2, head_dim=64,
    vocabulary=320, is_tied=False,
)  # fmt: skip
SEED = 4  # of the weights: every greedy token leads by at least 0.009 nats, a thousand times the rounding in float32
STOP = 0
NEW_TOKENS = 32
ROWS = 8

LOGPROB_TOLERANCE = {4: 1e-4, 2: 0.1}  # mean, in nats, by bytes of the compute type; 2e-6 and 0.02 on a CPU
PRODUCT_TOLERANCE = {4: 1e-4, 2: 2e-2}  # of a product's size, likewise
QUANTISATION_ERROR = 0.15  # of the weights' size; NF4 has 0.1 on normally distributed weights
LOSS_TOLERANCE, NORM_TOLERANCE = 0.01, 0.05  # relative; bfloat16 is 0.0002 and 0.005 off float32


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found, in words with its figure."""

    state: State
    text: str


NO_GPU = Outcome("not applicable", "only a GPU has it")


# The engine


def graphs(device: str, folder: Path) -> Outcome:
    """Compare replayed CUDA graphs with the same padded steps without them."""
    return NO_GPU if device == "cpu" else compare_replays(device)


def compare_replays(device: str) -> Outcome:
    """Answer greedily with and without graphs, tokens being inserted: ids and log-probabilities must be equal.

    Greedily, because drawing sums on the GPU in an order that PyTorch does not promise. All logits of a step are in the
    normaliser of its log-probabilities.
    """
    from dpost_lite.sampling.engine import Engine

    model = tiny_model(device, hardware.compute_dtype(on=device))
    asked = list(_requests(samples=2))
    with_graphs, without = (
        Engine(model, writer=_Inserter(), max_rows=ROWS, static=True, graphs=has_graphs) for has_graphs in (True, False)
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        replayed, eager = ({(one.key, one.index): one for one in e.run(asked)} for e in (with_graphs, without))
    if refused := [str(one.message) for one in warned if "cannot be CUDA graphs" in str(one.message)]:
        return Outcome("failed", refused[0])
    if any(replayed[key].token_ids != one.token_ids for key, one in eager.items()):
        return Outcome("failed", "CUDA graphs draw other tokens here")
    off = max(_largest_difference(replayed[key].logprobs, one.logprobs) for key, one in eager.items())
    if off:
        return Outcome("failed", f"CUDA graphs give other logits here (log-probabilities differ by {off:.2g} nats)")
    num_replayed = with_graphs.statistics.num_replayed
    if not num_replayed:
        return Outcome("failed", "no step became a CUDA graph here")
    return Outcome("ok", f"{num_replayed} replayed steps give the same log-probabilities to the last bit")


def engine(device: str, folder: Path) -> Outcome:
    """Compare padded steps with transformers: greedy tokens in float32, log-probabilities in the compute type."""
    import torch

    from dpost_lite.sampling.engine import Engine

    torch.set_float32_matmul_precision("highest")  # no TF32
    model, asked = tiny_model(device, torch.float32), list(_requests())
    drawn = {one.key: one for one in Engine(model, writer=None, max_rows=ROWS, static=True, graphs=False).run(asked)}
    wrong = [one.key for one in asked if drawn[one.key].token_ids != _generated(model, one)]
    if wrong:
        which = f"for {len(wrong)} of {len(asked)} prompts"
        return Outcome("failed", f"the sampler's greedy tokens are not those of transformers {which}")
    num_tokens = sum(len(one.token_ids) for one in drawn.values())
    dtype = hardware.compute_dtype(on=device)
    model = tiny_model(device, dtype)
    sampler = Engine(model, writer=_Inserter(), max_rows=ROWS, static=True, graphs=False)
    samples = list(sampler.run(_requests(samples=2, temperature=1.0)))  # the end gives transformers' attention back
    differences = [one for sample in samples for one in _differences_from_forward(model, sample)]
    off = sum(differences) / len(differences)
    if not off <= LOGPROB_TOLERANCE[dtype.itemsize]:
        return Outcome(
            "failed",
            f"the sampler's log-probabilities are {off:.2g} nats off those of transformers in {_short(dtype)} (mean)",
        )
    return Outcome(
        "ok",
        f"{num_tokens} greedy tokens are those of transformers; in {_short(dtype)}, log-probabilities are {off:.1g} "
        "nats off (mean)",
    )


def tiny_model(device: str, dtype: "torch.dtype") -> Any:
    """Return the random Llama, the same on every device but for the rounding to `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(_config(SHAPE), dtype=torch.float32)
    for weights in model.parameters():  # not the buffers: rotary frequencies stay in float32
        weights.data = weights.data.to(dtype)
    return model.to(device).eval()


def _config(shape: ModelShape) -> Any:
    config = shape.config()
    config.initializer_range = 0.1  # far from uniform, so that attention matters
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, STOP, 2
    config.max_position_embeddings = 512
    return config


def _requests(samples: int = 1, temperature: float = 0.0) -> Iterator["Request"]:
    """Prompts of mixed lengths."""
    from dpost_lite.sampling.request import Request

    dice = random.Random(0)
    for key, length in enumerate((1, 5, 12, 17, 30, 41)):
        yield Request(
            key=key,
            prompt_ids=tuple(dice.randrange(3, SHAPE.vocabulary) for _ in range(length)),
            stop_ids=frozenset({STOP}),
            num_samples=samples,
            temperature=temperature,
            max_new_tokens=NEW_TOKENS,
            seed=key,
        )


class _Inserter:
    """A writer that inserts three tokens behind every sixth one; where it begins depends on the row's first token."""

    num_calculated = num_refused = 0

    def __init__(self) -> None:
        self._count: int | None = None

    def row(self) -> "_Inserter":
        return _Inserter()

    def push(self, token_id: int) -> list[int] | None:
        self._count = token_id % 6 if self._count is None else self._count + 1
        return [token_id, 7, 8, 9] if self._count % 6 == 5 else None

    def poll(self) -> list[int] | None:
        return None


def _generated(model: Any, request: "Request") -> list[int]:
    """What transformers' own greedy `generate` writes."""
    import torch

    ids = torch.tensor([request.prompt_ids], device=model.device)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.max_new_tokens
    )
    return found[0, ids.shape[1] :].tolist()


def _differences_from_forward(model: Any, sample: "Completion") -> list[float]:
    """Return how far each sampled token's log-probability is from that of one forward over the sample, in nats."""
    import torch

    (prompt,) = (one.prompt_ids for one in _requests() if one.key == sample.key)
    ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
    with torch.inference_mode():
        logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    found = zip(sample.logprobs, expected, sample.forced, strict=True)
    return [abs(a - b) for a, b, is_forced in found if not is_forced]


def _largest_difference(first: list[float], second: list[float]) -> float:
    """Return the largest absolute difference; infinity if one is NaN."""
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


# 4 bit


def four_bit(device: str, folder: Path) -> Outcome:
    """Compare a 4-bit layer with its dequantised weights, for one row, many rows and the gradient."""
    import torch

    dtype = hardware.compute_dtype(on=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = torch.randn(SHAPE.intermediate, SHAPE.hidden) * 0.1
        rows = torch.randn(64, SHAPE.hidden)
    layer, weights = quantised(original, device, dtype)
    lost = relative(weights.cpu().float(), original)
    inputs = rows.to(device, dtype).requires_grad_()
    products = layer(inputs)
    products.float().square().sum().backward()
    exact = inputs.detach().float().requires_grad_()
    expected = exact @ weights.float().T
    expected.square().sum().backward()
    with torch.no_grad():
        one_row = layer(inputs[:1])  # a kernel of its own
    found = {
        "a product with 64 rows": relative(products, expected),
        "a product with one row": relative(one_row, expected[:1]),
        "a gradient": relative(inputs.grad, exact.grad),
    }
    name, off = max(found.items(), key=lambda one: math.inf if math.isnan(one[1]) else one[1])
    if not lost <= QUANTISATION_ERROR:
        return Outcome("failed", f"4-bit weights are {lost:.0%} off the original ones here, usually 10 %")
    if not off <= PRODUCT_TOLERANCE[dtype.itemsize]:
        return Outcome("failed", f"{name} of a 4-bit layer is {off:.2%} off that of its weights here")
    return Outcome("ok", f"products and gradient within {off:.2%} of those of the dequantised weights")


def quantised(original: "torch.Tensor", device: str, dtype: "torch.dtype") -> tuple[Any, Any]:
    """Return a linear layer of 4-bit weights as a run has them, and its dequantised weights."""
    import bitsandbytes

    from dpost_lite.models.private_api import keep_differentiable

    outputs, inputs = original.shape
    layer = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    layer.weight.data = original.to(dtype)
    keep_differentiable(layer)
    layer = layer.to(device)
    packed: Any = layer.weight
    return layer, bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)


def relative(found: Any, expected: Any) -> float:
    """Return the size of the difference relative to that of `expected` (Frobenius)."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


# Training


def plain_step(device: str, folder: Path) -> Outcome | None:
    """Write a base and an adapter into `folder`, and what the plain backend's step computes, for `unsloth_step`."""
    if device == "cpu":
        return NO_GPU
    if importlib.util.find_spec("unsloth") is None:
        return Outcome("not applicable", "not installed")
    write_plain_step(folder)
    return None


def write_plain_step(folder: Path) -> None:
    """Do the part of `plain_step` that needs no GPU."""
    import torch

    from dpost_lite.models import adapters, loading

    save_base(folder / "base", SHAPE)
    policy = adapters.create(loading.load(folder / "base", "4bit"), Recipe().lora, seed=0)
    for name, weights in policy.named_parameters():
        if "lora_B" in name:  # zero in a fresh adapter, whose other half would get no gradient
            torch.nn.init.normal_(weights.data, std=0.02)
    adapters.save(policy, None, folder / "adapter")
    write_json(folder / "plain.json", lora_step(folder, "plain"))


def unsloth_step(device: str, folder: Path) -> Outcome:
    """Compare unsloth's step with what `plain_step` left in `folder`; in a process that imported unsloth first."""
    plain, found = read_json(folder / "plain.json"), lora_step(folder, "unsloth")
    figures = ", ".join(f"{name} {found[name]:.4g}, plain {plain[name]:.4g}" for name in plain)
    limits = {"loss": LOSS_TOLERANCE, "gradient norm": NORM_TOLERANCE}
    if all(abs(found[name] - plain[name]) <= limit * abs(plain[name]) for name, limit in limits.items()):
        return Outcome("ok", f"a step is that of the plain backend ({figures})")
    return Outcome("failed", f"unsloth's step differs from the plain one here ({figures})")


def lora_step(folder: Path, backend: Backend) -> dict[str, float]:
    """Return loss and gradient norm of one SFT step with the base and adapter in `folder`."""
    from dpost_lite.models import adapters, loading, sft, training
    from dpost_lite.models.private_api import loss_of

    recipe, dice = Recipe(model=ModelRecipe(precision="4bit")), random.Random(0)
    policy = adapters.load_for_dpo(folder / "base", folder / "adapter", recipe, backend)
    prompter = loading.load_prompter(folder / "base", recipe.model)
    rows = []
    for length in (64, 50, 37, 20):
        ids = [dice.randrange(3, 256) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100] * 10 + ids[10:]})
    settings = recipe.sft.model_copy(update={"batch_size": 4, "micro_batch_size": 4})
    trainer = sft.make_trainer(policy, prompter, rows, folder / f"trainer-{backend}", settings, seed=0)
    training.keep_float32(trainer.model)
    if trainer.args.gradient_checkpointing:  # as training.probe does
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    with trainer.accelerator.autocast():
        loss = loss_of(trainer, trainer.model, batch)
    loss.backward()
    gradients = [one.grad.float() for one in trainer.model.parameters() if one.grad is not None]
    return {"loss": float(loss.detach()), "gradient norm": math.hypot(*(float(one.norm()) for one in gradients))}


def save_base(folder: Path, shape: ModelShape) -> None:
    """Save a random Llama with a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["</s>", "<s>", "<pad>"]  # as in _config
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos, bos, pad = special
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=pad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=torch.float32)
    with quiet_transformers():
        model.save_pretrained(folder)
        wrapped.save_pretrained(folder)


def _short(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
