"""Does the planner agree with others' measurements? Its memory and tokens per second for settings they published.

    python bench/published.py [--save bench/results/published.json]

Nothing is trained: for each published figure, the planner counts a run with the same model, rank, batch, length and
technique. `SOURCES` says where the figures are from and what had to be assumed. The last line is one JSON object.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from publish import publish, result_of

from dpost_lite.models.shapes import BASES, ModelShape
from dpost_lite.planner.device import CARDS, GIB, Device
from dpost_lite.planner.footprint import Technique, training_fragmentation, training_parts, with_reserve
from dpost_lite.planner.pace import LOADING_SECONDS, TRAINING_EFFICIENCY, Pace
from dpost_lite.planner.workload import GSM8K, Workload
from dpost_lite.recipe import LoraRecipe, ModelRecipe, Recipe, SftRecipe
from dpost_lite.runs.stage_names import StageName

MEMORY_WITHIN, RATE_WITHIN = 0.15, 0.30
GB = 1e9 / GIB

Counted = Literal["allocated", "reserved", "process"]
"""Which memory was published: PyTorch's tensors, what it holds of the GPU for them, or all of the process."""


@dataclass(frozen=True)
class Source:
    """Where figures are from: the sentence that states their settings, what it leaves open and is assumed, and what
    the planner has no count for, if anything.
    """

    url: str
    quote: str
    assumed: str
    counted: Counted
    not_counted: str = ""


SOURCES = {
    "torchtune": Source(
        "https://github.com/pytorch/torchtune#memory-and-training-speed",
        "all the below numbers are provided for batch size 2 (without gradient accumulation), a dataset packed to "
        "sequence length 2048, and torch compile enabled",
        "rank 8 on all linear layers but k, checkpointing and AdamW, as in the config 8B_(q)lora_single_device; logits "
        "of the loss in chunks; allocated",
        "allocated",
    ),
    "torchtune, flags": Source(
        "https://github.com/pytorch/torchtune#optimization-flags",
        "Baseline uses Recipe=full_finetune_single_device, Model=Llama 3.2 3B, Batch size=2, Max sequence length=4096, "
        "Precision=bf16, Hardware=A100 … Each technique is added on top of the previous one",
        "rank 64 on all linear layers but k, as in the config 3B_(q)lora_single_device; allocated",
        "allocated",
        "layers' inputs are moved to RAM",
    ),
    "LitGPT": Source(
        "https://github.com/Lightning-AI/litgpt/blob/main/tutorials/resource-tables.md",
        "conducted on 1xA100 with a minibatch size of 128 using the finetune/lora.py script … the longest training "
        "example … Llama 2: 1304 tokens",
        "rank 8 on q and v (from the trainable parameters), no checkpointing and the head in chunks, as in the script; "
        "allocated, in 10⁹ bytes",
        "allocated",
    ),
    "Unsloth, HF+FA2": Source(
        "https://github.com/unslothai/unsloth#context-length-benchmarks",
        "4bit QLoRA on all linear layers (Q, K, V, O, gate, up and down) with rank = 32 with a batch size of 1. We "
        "padded all sequences to a certain maximum sequence length",
        "that length fills the card, in GiB; checkpointing, 8-bit AdamW; embedding, head and activations in float32, "
        "as peft prepares 4-bit models (Unsloth itself: in 16 bit). All lengths are on one straight line: the first, "
        "one in the middle and the last are taken",
        "process",
    ),
    "LLaMA-Factory, FA2": Source(
        "https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison",
        "GPU: NVIDIA A100 40GB * 1; Model: LLaMA2-7B; Batch size: 1; Gradient accumulation: 4; LoRA rank: 8; LoRA "
        "modules: all; Quantization bit: 4",
        "checkpointing, as is the default; GB is GiB of the process, rounded to whole ones",
        "process",
    ),
    "answer.ai": Source(
        "https://github.com/AnswerDotAI/fsdp_qlora/blob/main/benchmarks_03_2024.md",
        "--use_gradient_checkpointing True … Llama-2 7B with Context Length of 2048 … “ddp” … keeps a full copy of the "
        "weights on each GPU … 1,024 samples",
        "rank 64 on all linear layers but o, bfloat16 and AdamW, the defaults of its train.py; half of the rows on "
        "each of the two cards",
        "reserved",
    ),
    "Qwen, LoRA": Source(
        "https://github.com/QwenLM/Qwen#profiling-of-memory-and-speed",
        "a single A100-SXM4-80G GPU … Flash attention 2 is applied. We uniformly use a batch size of 1 and gradient "
        "accumulation of 8. We profile the memory (GB) and speed (s/iter) of inputs of different lengths",
        "rank 64 on all linear layers, checkpointing and AdamW, as in its finetune.py and script; an iteration is the "
        "eight rows; G is GiB of the process",
        "process",
    ),
    "T4": Source(
        "https://github.com/Anassbzdd/fitcheck/tree/main/data/measurements",
        "QLoRA [q,k,v,o], fp16, adamw, ckpt, attn=sdpa; activation_dtype fp32 (JSON, with all settings)",
        "nothing: embedding, head and activations are in float32 there, and counted so",
        "allocated",
    ),
}
SOURCES["T4, process"] = replace(SOURCES["T4"], counted="process")
SOURCES["Unsloth"] = replace(SOURCES["Unsloth, HF+FA2"], not_counted="Unsloth's kernels; layers' inputs in RAM")
SOURCES["LLaMA-Factory, Unsloth"] = replace(SOURCES["LLaMA-Factory, FA2"], not_counted="Unsloth's kernels")
SOURCES["Qwen, Q-LoRA"] = replace(SOURCES["Qwen, LoRA"], not_counted="GPTQ (counted as NormalFloat); DeepSpeed")
SOURCES["Qwen, full"] = replace(SOURCES["Qwen, LoRA"], not_counted="bfloat16, float32 copies in DeepSpeed's buffers")


def _shape(
    name: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int,
    *, tied: bool = False, bias: bool = False,
) -> ModelShape:  # fmt: skip
    return ModelShape(
        name=name, num_layers=layers, hidden=hidden, intermediate=intermediate, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=hidden // heads, vocabulary=vocabulary, is_tied=tied, has_qkv_bias=bias,
    )  # fmt: skip


LLAMA_2_7B = _shape("Llama-2-7B", 32, 4096, 11_008, 32, 32, 32_000)
LLAMA_2_13B = _shape("Llama-2-13B", 40, 5120, 13_824, 40, 40, 32_000)
LLAMA_3_8B = replace(BASES["meta-llama/Llama-3.1-8B"].shape, name="Llama-3.1-8B")
LLAMA_3_3B = _shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128_256, tied=True)
LLAMA_3_1B = _shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128_256, tied=True)
QWEN_1B8 = _shape("Qwen-1.8B", 24, 2048, 5504, 16, 16, 151_936, bias=True)
QWEN_7B = _shape("Qwen-7B", 32, 4096, 11_008, 32, 32, 151_936, bias=True)
QWEN_14B = _shape("Qwen-14B", 40, 5120, 13_696, 40, 40, 152_064, bias=True)
QWEN_72B = _shape("Qwen-72B", 80, 8192, 24_576, 64, 64, 152_064, bias=True)
QWEN_2_1B5 = replace(BASES["Qwen/Qwen2.5-1.5B"].shape, name="Qwen2.5-1.5B")
QWEN_2_CODER = replace(QWEN_2_1B5, name="Qwen2.5-Coder-1.5B")
QWEN_2_7B = replace(BASES["Qwen/Qwen2.5-7B"].shape, name="Qwen2.5-7B")
TINY_LLAMA = _shape("TinyLlama-1.1B", 22, 2048, 5632, 32, 4, 32_000)
SMOLLM2 = _shape("SmolLM2-1.7B", 24, 2048, 8192, 32, 32, 49_152, tied=True)
MISTRAL = _shape("Mistral-7B-v0.3", 32, 4096, 14_336, 32, 8, 32_768)
DEEPSEEK = _shape("deepseek-coder-1.3b", 24, 2048, 5504, 16, 16, 32_256)

FLOPS = {name: flops for name, flops, _ in CARDS.values()} | {"RTX 3090": 78e12, "T4": 24e12}
"""Of large products in 16 bit. The RTX 3090's is from github.com/mag-/gpu_benchmark. The T4's is one user's mean, 37 %
of what it is sold with (limited to 70 W): forums.developer.nvidia.com/t/about-gpu-peak-performance/264462.
"""

ALL = "q k v o gate up down"


@dataclass(frozen=True)
class Run:
    """A published run. `gib` and `rate` (tokens per second and card) are what was measured, `cell` where it stands."""

    source: str
    shape: ModelShape
    precision: Literal["4bit", "16bit", "full"]
    rank: int
    micro: int
    length: int
    cell: str
    gib: float | None = None
    rate: float | None = None
    card: str = "A100"
    adapted: str = ALL
    recomputes: bool = True
    in_chunks: bool = False
    state_bytes: int = 8
    number_bytes: int = 2

    @property
    def num_trained(self) -> int:
        """Weights of the adapter, on the linear layers that are adapted."""
        if self.precision == "full":
            return self.shape.num_parameters
        sizes = dict(zip(ALL.split(), self.shape.linear_sizes, strict=True))
        return self.shape.num_layers * self.rank * sum(sum(sizes[name]) for name in self.adapted.split())

    @property
    def recipe(self) -> Recipe:
        """As if dpost-lite trained it: one epoch of SFT."""
        return Recipe(
            method="sft",
            model=ModelRecipe(precision=self.precision),
            lora=LoraRecipe(rank=max(1, self.rank)),
            sft=SftRecipe(max_length=self.length, epochs=1),
        )

    @property
    def work(self) -> Workload:
        """Rows that all have the full length; so many that loading takes no part of the time."""
        return replace(GSM8K, num_labelled=10**6, prompt=0, rationale=self.length, longest=self.length)

    @property
    def device(self) -> Device:
        """The card; the planner's figures need no bandwidth for training."""
        return Device("cuda", 0, self.number_bytes, FLOPS[self.card], 0, self.card)

    def planned_gib(self) -> float:
        """The planner's count of what was published."""
        technique = Technique(self.num_trained, self.state_bytes, self.recomputes, self.in_chunks)
        parts = training_parts("sft", self.recipe, self.shape, self.work, self.device, self.micro, technique)
        counted, fragmentation = SOURCES[self.source].counted, training_fragmentation(self.recipe, self.device)
        if counted == "process":
            parts = with_reserve(parts, self.device, fragmentation)
        return sum(parts.values()) * (1 + fragmentation if counted == "reserved" else 1) / GIB

    def planned_rate(self) -> float:
        """The planner's tokens per second."""
        pace = Pace(self.recipe, self.shape, self.work, self.device, num_rows=1, is_merged=False)
        stage = StageName.parse("sft-0")
        assert stage is not None
        estimate = pace.of(stage)
        return estimate.tokens / (estimate.seconds - LOADING_SECONDS["cuda"])


def runs() -> Iterator[Run]:
    """All figures that were found with enough of their settings, near or far."""
    yield from _torchtune()
    yield from _litgpt()
    yield from _unsloth()
    yield from _llama_factory()
    yield from _answer_ai()
    yield from _qwen()
    yield from _t4()


def _torchtune() -> Iterator[Run]:
    for precision, gib, rate in (("16bit", 16.2, 3083), ("4bit", 7.4, 2413)):
        cell = f"{'QLoRA' if precision == '4bit' else 'LoRA'} | 1x 4090 | {gib} GiB | {rate}"
        yield Run(
            "torchtune", LLAMA_3_8B, precision, 8, 2, 2048, cell, gib, rate, "RTX 4090", "q v o gate up down",
            in_chunks=True,
        )  # fmt: skip
    for precision, gib, rate in (("16bit", 8.5, 8210), ("4bit", 4.6, 8035)):
        cell = f"{'QLoRA' if precision == '4bit' else 'LoRA'} | {gib} | {rate}"
        yield Run(
            "torchtune, flags", LLAMA_3_3B, precision, 64, 2, 4096, cell, gib, rate, adapted="q v o gate up down",
            in_chunks=True,
        )  # fmt: skip


def _litgpt() -> Iterator[Run]:
    for shape, precision, micro, gb in (
        (LLAMA_2_7B, "16bit", 1, 21.30), (LLAMA_2_7B, "16bit", 2, 29.07), (LLAMA_2_7B, "4bit", 1, 13.84),
        (LLAMA_2_13B, "16bit", 1, 38.12), (LLAMA_2_13B, "4bit", 1, 22.55),
    ):  # fmt: skip
        cell = f"Llama 2 | {'bnb.nf4-dq' if precision == '4bit' else 'None'} | {micro} | {gb:.2f} GB"
        yield Run(
            "LitGPT", shape, precision, 8, micro, 1304, cell, gb * GB, adapted="q v", recomputes=False, in_chunks=True
        )


def _unsloth() -> Iterator[Run]:
    for source, found in (
        ("Unsloth, HF+FA2", {12: 932, 24: 5789, 80: 28_454}),
        ("Unsloth", {8: 2972, 24: 78_475, 80: 342_733}),
    ):
        for size, length in found.items():
            run = Run(source, LLAMA_3_8B, "4bit", 32, 1, length, f"{size} GB | {length:,}", size, state_bytes=2)
            yield replace(run, number_bytes=2 if source == "Unsloth" else 4)


def _llama_factory() -> Iterator[Run]:
    lengths = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 100_000)
    for source, sizes, rates in (
        ("LLaMA-Factory, FA2", (6, 7, 9, 12, 19, 32), (2295, 2741, 2926, 3128, 3542, 2216)),
        (
            "LLaMA-Factory, Unsloth",
            (5, 6, 7, 8, 10, 16, 25, 37),
            (2556, 3178, 3413, 3632, 4050, 2456, 1820, 1202),
        ),
    ):
        for length, size, rate in zip(lengths, sizes, rates, strict=False):
            yield Run(source, LLAMA_2_7B, "4bit", 8, 1, length, f"{length:,}: {size}GB, {rate:,}", size, rate)


def _answer_ai() -> Iterator[Run]:
    for precision, micro, gib, by_card in (
        ("4bit", 8, 20.94, {"RTX 3090": 875, "RTX 4090": 450}),
        ("16bit", 4, 22.04, {"RTX 3090": 881, "RTX 4090": 437}),
    ):
        for card, seconds in by_card.items():
            cell = f"{'QLoRA' if precision == '4bit' else 'LoRA'} | DDP | {micro} | {gib} | {seconds}"
            yield Run(
                "answer.ai", LLAMA_2_7B, precision, 64, micro, 2048, cell, gib if card == "RTX 3090" else None,
                512 * 2048 / seconds, card, "q k v gate up down",
            )  # fmt: skip


def _qwen() -> Iterator[Run]:
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    for source, shape, cells in (
        ("Qwen, LoRA", QWEN_1B8, "6.7/1.0 7.4/1.0 8.4/1.1 11.0/1.7 16.2/3.3 21.8/6.8"),
        ("Qwen, LoRA", QWEN_7B, "20.1/1.2 20.4/1.5 21.5/2.8 23.8/5.2 29.7/10.1 36.6/21.3"),
        ("Qwen, LoRA", QWEN_14B, "34.6/1.6 35.1/2.4 35.3/4.4 37.4/8.4 42.5/17.0 55.2/36.0"),
        ("Qwen, Q-LoRA", QWEN_1B8, "5.8/1.4 6.0/1.4 6.6/1.4 7.8/2.0 10.2/3.4 15.8/6.5"),
        ("Qwen, Q-LoRA", QWEN_7B, "11.5/3.0 11.5/3.0 12.3/3.5 13.9/7.0 16.9/11.6 23.5/22.3"),
        ("Qwen, Q-LoRA", QWEN_14B, "18.7/5.3 18.4/6.3 18.9/8.2 19.9/11.8 23.0/20.1 27.9/38.3"),
        ("Qwen, Q-LoRA", QWEN_72B, "61.4/27.4 61.4/31.5 62.9/41.4 64.1/59.5 68.0/97.7 75.6/179.8"),
        ("Qwen, full", QWEN_1B8, "43.5/2.1 43.5/2.2 43.5/2.2 43.5/2.3 47.1/2.8 48.3/5.6"),
    ):
        is_full = source.endswith("full")
        precision = "full" if is_full else "4bit" if source.endswith("Q-LoRA") else "16bit"
        for length, cell in zip(lengths, cells.split(), strict=True):
            gib, seconds = map(float, cell.split("/"))
            rate = None if is_full else 8 * length / seconds  # ours would be float32, theirs is bfloat16
            text = f"{length}: {gib}G / {seconds}s/it"
            yield Run(source, shape, precision, 0 if is_full else 64, 1, length, text, gib, rate)


def _t4() -> Iterator[Run]:
    for shape, rank, micro, length, allocated, process, seconds in (
        (TINY_LLAMA, 32, 2, 512, 1847, 2267, None), (TINY_LLAMA, 32, 2, 1024, 2528, 3033, None),
        (TINY_LLAMA, 32, 2, 2048, 3897, 4781, None), (SMOLLM2, 32, 4, 1024, 5281, 6049, None),
        (QWEN_2_1B5, 32, 2, 1024, 6823, 7373, None), (QWEN_2_CODER, 16, 1, 1024, 4235.2, 5352.9, 1.147),
        (QWEN_2_7B, 16, 1, 1024, 10_585.8, 12_020.9, 3.725), (MISTRAL, 16, 1, 1024, 6056.3, 6540.9, 3.901),
        (DEEPSEEK, 16, 1, 1024, 1971.7, 2312.9, 0.999), (LLAMA_3_3B, 16, 1, 1024, 5495.0, 6408.9, 2.276),
        (LLAMA_3_1B, 16, 1, 1024, 3723.1, 4166.9, 0.867),
    ):  # fmt: skip
        run = Run("T4", shape, "4bit", rank, micro, length, "", card="T4", adapted="q k v o", number_bytes=4)
        cell = f"peak_allocated_mib {allocated}" + (f", step_seconds {seconds}" if seconds else "")
        yield replace(run, cell=cell, gib=allocated / 1024, rate=micro * length / seconds if seconds else None)
        yield replace(run, source="T4, process", cell=f"process_mib {process}", gib=process / 1024)


def compare() -> list[dict[str, Any]]:
    """Return a row for each figure: ours beside theirs, and ours as a multiple of theirs."""
    rows = []
    for run in runs():
        planned = (run.planned_gib() if run.gib else None, run.planned_rate() if run.rate else None)
        rows.append(
            {
                "source": run.source,
                "model": run.shape.name,
                "precision": run.precision,
                "rank": run.rank,
                "batch": run.micro,
                "length": run.length,
                "card": run.card,
                "cell": run.cell,
                "gib": run.gib,
                "planned_gib": planned[0],
                "memory_ratio": planned[0] / run.gib if planned[0] and run.gib else None,
                "rate": run.rate,
                "planned_rate": planned[1],
                "rate_ratio": planned[1] / run.rate if planned[1] and run.rate else None,
            }
        )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how many ratios are within the limits, and their median: by source, for those counted whole, for all."""
    own = [name for name, source in SOURCES.items() if not source.not_counted]
    groups = {name: [name] for name in SOURCES} | {"counted whole": own, "all": list(SOURCES)}
    return {
        group: {
            name: _near([row[f"{name}_ratio"] for row in rows if row["source"] in names], limit)
            for name, limit in (("memory", MEMORY_WITHIN), ("rate", RATE_WITHIN))
        }
        for group, names in groups.items()
    }


def held_out(rows: list[dict[str, Any]]) -> list[int]:
    """Return how many rates are within the limit, at least and at most, if each source is planned with a training
    efficiency that is fitted to the others: several fit equally well.
    """
    rates = [row for row in rows if row["rate_ratio"] and not SOURCES[row["source"]].not_counted]

    def within(efficiency: float, rows: list[dict[str, Any]]) -> int:
        scale = efficiency / TRAINING_EFFICIENCY["cuda"]
        return _near([row["rate_ratio"] * scale for row in rows], RATE_WITHIN)["within"]

    least = most = 0
    for source in {row["source"] for row in rates}:
        own = [row for row in rates if row["source"] == source]
        others = [row for row in rates if row["source"] != source]
        fits = {thousandths / 1000: within(thousandths / 1000, others) for thousandths in range(100, 1000)}
        found = [within(efficiency, own) for efficiency, count in fits.items() if count == max(fits.values())]
        least, most = least + min(found), most + max(found)
    return [least, most]


def _near(ratios: list[float | None], limit: float) -> dict[str, Any]:
    known = [ratio for ratio in ratios if ratio is not None]
    within = sum(abs(ratio - 1) <= limit for ratio in known)
    return {"of": len(known), "within": within, "median": median(known) if known else None}


def main() -> None:
    """Print the table, and how many figures are near."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    rows = compare()
    print(
        f"{'source':<23}{'model':<20}{'weights':>8}{'rank':>5}{'batch':>6}{'length':>8}"
        f"{'GiB':>8}{'planned':>9}{'ratio':>7}{'tokens/s':>10}{'planned':>9}{'ratio':>7}"
    )
    for row in rows:
        print(
            f"{row['source']:<23}{row['model']:<20}{row['precision']:>8}{row['rank'] or '–':>5}{row['batch']:>6}"
            f"{row['length']:>8}{_number(row['gib'], 8, 1)}{_number(row['planned_gib'], 9, 1)}"
            f"{_number(row['memory_ratio'], 7, 2)}{_number(row['rate'], 10, 0)}{_number(row['planned_rate'], 9, 0)}"
            f"{_number(row['rate_ratio'], 7, 2)}"
        )
    by_source = summary(rows)
    print(f"\n{'source':<23}{'memory within 15 %':>19}{'median':>8}{'rate within 30 %':>18}{'median':>8}")
    for source, found in by_source.items():
        print(f"{source:<23}{_share(found['memory'], 19)}{_share(found['rate'], 18)}")
    fitted = held_out(rows)
    print("rates within 30 % with a training efficiency fitted to the other sources: {} to {}".format(*fitted))
    sources = {name: asdict(source) for name, source in SOURCES.items()}
    publish(result_of("published", rows=rows, by_source=by_source, held_out=fitted, sources=sources), arguments.save)


def _share(found: dict[str, Any], width: int) -> str:
    within = f"{found['within']} of {found['of']}" if found["of"] else "–"
    return f"{within:>{width}}{_number(found['median'], 8, 2)}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{value:{width}.{digits}f}" if value is not None else f"{'–':>{width}}"


if __name__ == "__main__":
    main()
