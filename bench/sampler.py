"""How fast are rationales sampled, against the papers' procedure and other engines, on the same weights and prompts?

    python bench/sampler.py --data-dir DIR [--adapter DIR] [--model NAME] [--questions 64] [--samples 4] [--rows 256]
                            [--entrants ours papers …] [--sweep] [--save bench/results/sampler.json]

Entrants: `ours` (with calculator), `ours-off` (without), `papers` (transformers' generate in padded batches of 32,
one pass per sample, a hook that decodes and matches every row at every step: papers' code, `generate.py`), `generate`
(the same without the hook), `continuous` (transformers' continuous batching), `llama.cpp` (llama-cpp-python with
parallel sequences on the same weights in 16 bit) and, only if asked for, `ours-products` (attention by matrix products
alone) and `vllm` (in 16 bit; it must be installed).
Same prompts, stop token, temperature and limit for all. A useful token lies before the end of its answer, the stop
token included. Every entrant is warmed up and repeated; the table shows the median and the spread.

The ceiling is the time that reading weights and cache once per step, or the arithmetic, would take at this
machine's measured rates. The last line is one JSON object.
"""

import argparse
import copy
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as the stages of a run have them (pipeline/worker.py)
from publish import publish, result_of, save  # before torch: it sets how OpenMP's threads wait

# isort: split
import torch

from dpost_lite.models import adapters, demo, hub, loading
from dpost_lite.models.onednn_layout import use_blocked_layout
from dpost_lite.problems import datasets, synthetic
from dpost_lite.problems.calculator import Calculator
from dpost_lite.problems.forcing import Forcer, Writer
from dpost_lite.problems.prompts import Prompter
from dpost_lite.recipe import ModelRecipe
from dpost_lite.sampling import model_runner
from dpost_lite.sampling.cache import kv_shape
from dpost_lite.sampling.engine import Engine
from dpost_lite.sampling.request import Request

PAPERS_BATCH = 32
PAPERS_TOP_K = 50  # what transformers takes where nothing is given
CONTINUOUS_REQUESTS = 64  # at once; its attention multiplies every query with every cache: 256 took 1.5 times as long
LLAMA_SEQUENCES = 64
LLAMA_PROMPTS = 8  # computed together, then copied to their samples
ENTRANTS = ("ours", "ours-off", "llama.cpp", "papers", "continuous", "generate", "ours-products", "vllm")


@dataclass(frozen=True)
class Setting:
    """What every entrant is given: the model, the prompts, and how to sample.

    With `lengths`, an answer to a prompt has just as many tokens, and no stop token: for random weights (bench/gpu.py).
    `writer` takes the place of the calculator; `folder` holds the model's weights if they are saved; `memory_share` is
    the share of the GPU that may be used, if it is limited.
    """

    model: Any
    prompter: Prompter
    prompts: list[tuple[int, ...]]
    num_samples: int
    num_rows: int
    max_new_tokens: int
    temperature: float
    lengths: Mapping[tuple[int, ...], int] | None = None
    writer: Writer | None = None
    folder: Path | None = None
    memory_share: float | None = None

    @property
    def stop_id(self) -> int | None:
        """The token that ends an answer, if one does."""
        return None if self.lengths else self.prompter.stop_id

    def limit(self, prompt: tuple[int, ...]) -> int:
        """Return how many tokens an answer to this prompt may have, or has."""
        return self.lengths[prompt] if self.lengths else self.max_new_tokens


@dataclass(frozen=True)
class Outcome:
    """What one pass of one entrant produced."""

    num_tokens: int
    num_rationales: int
    num_forced: int = 0
    num_steps: int = 0
    row_steps: int = 0
    num_rows: int = 0
    seconds: dict[str, float] | None = None


def main() -> None:
    """Run the entrants, print the table."""
    arguments = parse()
    torch.manual_seed(0)
    setting = prepare(arguments)
    repeats = arguments.repeats
    rates = machine_rates(setting.model.device, setting.model.dtype)
    rows: dict[str, dict[str, float]] = {}
    sizes = {"questions": len(setting.prompts), "samples": setting.num_samples, "repeats": repeats}
    result = result_of("sampler", **sizes, rates=rates, entrants=rows)
    for name in arguments.entrants:
        rows[name] = measure(name, setting, repeats)
        save(result, arguments.save)  # a run takes more than an hour on two cores
    print(f"\n{'entrant':<12}{'tok/s':>9}{'spread':>9}{'rationales/s':>14}{'forced':>8}{'occupancy':>11}")
    for name, row in rows.items():
        print(
            f"{name:<12}{row['tokens_per_s']:>9.1f}{row['spread']:>8.0%} {row['rationales_per_s']:>13.2f}"
            f"{row['forced']:>8.1%}{row.get('occupancy', float('nan')):>11.1%}"
        )
    if "ours" in rows:
        result["ceiling"] = print_ceiling(setting, rows["ours"], rates)
    print_ratios(rows, result)
    if arguments.sweep:
        result["sweep"] = sweep(setting, arguments.data_dir)
    publish(result, arguments.save)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.DEMO_MODEL)
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter to merge")
    parser.add_argument("--data-dir", type=Path, help="folder with gsm8k/test.jsonl; without it, built-in problems")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--entrants", nargs="+", choices=ENTRANTS, default=list(ENTRANTS[:-2]))
    parser.add_argument("--sweep", action="store_true", help="also: throughput by number of rows and by K")
    parser.add_argument("--save", type=Path, help="also write the JSON object to this file")
    return parser.parse_args()


def prepare(arguments: argparse.Namespace) -> Setting:
    """Load the merged weights and tokenise the prompts, longest first."""
    folder = hub.find(arguments.model)
    model = adapters.load_merged(folder, arguments.adapter, ModelRecipe(precision="16bit"))
    prompter = Prompter(loading.load_tokenizer(folder))
    return Setting(
        model, prompter, read_prompts(prompter, arguments.data_dir, arguments.questions), arguments.samples,
        arguments.rows, arguments.max_new_tokens, arguments.temperature,
    )  # fmt: skip


def read_prompts(prompter: Prompter, data_dir: Path | None, number: int) -> list[tuple[int, ...]]:
    """Tokenise the first `number` questions, the longest first."""
    if data_dir:
        problems = datasets.load("gsm8k", split="test", data_dir=data_dir).problems
    else:
        problems = synthetic.generate(number, seed=0)
    prompts = [prompter.prompt_ids(problem.question) for problem in problems[:number]]
    return sorted(prompts, key=len, reverse=True)


def measure(name: str, setting: Setting, repeats: int) -> dict[str, float]:
    """Warm an entrant up on a few prompts, then time `repeats` passes over all."""
    with entrant(name, setting) as run:
        run(setting.prompts[-4:])
        outcomes, seconds = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            outcomes.append(run(setting.prompts))
            seconds.append(time.perf_counter() - started)
            print(f"{name}: {outcomes[-1].num_tokens} tokens in {seconds[-1]:.1f} s", file=sys.stderr)
    rates = [outcome.num_tokens / s for outcome, s in zip(outcomes, seconds, strict=True)]
    last = outcomes[-1]
    row = {
        "tokens_per_s": statistics.median(rates),
        "spread": (max(rates) - min(rates)) / statistics.median(rates),
        "rationales_per_s": statistics.median(o.num_rationales / s for o, s in zip(outcomes, seconds, strict=True)),
        "forced": last.num_forced / last.num_tokens,
        "tokens_per_rationale": last.num_tokens / last.num_rationales,
        "tokens": last.num_tokens,
        "rationales": last.num_rationales,
        "seconds": statistics.median(seconds),
    }
    if last.num_steps:
        row["steps"] = last.num_steps
        row["rows"] = last.num_rows
        row["occupancy"] = last.row_steps / last.num_steps / last.num_rows
        row.update({f"seconds_{part}": s for part, s in (last.seconds or {}).items()})
    return row


class entrant:
    """Context manager: build what an entrant needs, hand out its `run(prompts) -> Outcome`, take it down again."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._name, self._setting, self._folder = name, setting, tempfile.TemporaryDirectory()
        self._run: Any = None

    def __enter__(self) -> Callable[[list[tuple[int, ...]]], Outcome]:
        setting = self._setting
        builders: dict[str, Callable[[], Any]] = {
            "ours": lambda: Ours(setting, with_calculator=True),
            "ours-off": lambda: Ours(setting, with_calculator=False),
            "ours-products": lambda: Ours(setting, with_calculator=True, with_kernel=False),
            "papers": lambda: Generate(setting, with_calculator=True),
            "generate": lambda: Generate(setting, with_calculator=False),
            "continuous": lambda: Continuous(setting),
            "llama.cpp": lambda: LlamaCpp(setting, Path(self._folder.name)),
            "vllm": lambda: Vllm(setting, Path(self._folder.name)),
        }
        self._run = builders[self._name]()
        return self._run

    def __exit__(self, *_: object) -> None:
        if hasattr(self._run, "close"):
            self._run.close()
        self._folder.cleanup()


class Ours:
    """The engine of this package, timed by part."""

    def __init__(self, setting: Setting, *, with_calculator: bool, with_kernel: bool = True) -> None:
        prompter = setting.prompter
        self._setting, self._model = setting, setting.model
        self._with_kernel = with_kernel
        if self._model.device.type == "cpu" and not getattr(self._model, "is_loaded_in_4bit", False):
            self._model = use_blocked_layout(copy.deepcopy(self._model))  # as a run samples
        writer = setting.writer or Forcer(prompter.token_text(), prompter.encode, Calculator(), prompter.notation)
        self._writer = writer if with_calculator else None

    def __call__(self, prompts: list[tuple[int, ...]]) -> Outcome:
        setting = self._setting
        no_kernel = patch.object(model_runner, "kernel_for", lambda *_, **__: None)
        with nullcontext() if self._with_kernel else no_kernel:
            engine = Engine(self._model, writer=self._writer, max_rows=setting.num_rows)
        stop_ids = frozenset(() if setting.stop_id is None else (setting.stop_id,))
        requests = [
            Request(
                key=i, prompt_ids=prompt, stop_ids=stop_ids, seed=i, num_samples=setting.num_samples,
                temperature=setting.temperature, max_new_tokens=setting.limit(prompt),
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        samples = list(engine.run(requests))
        stats = engine.statistics
        return Outcome(
            num_tokens=sum(len(sample.token_ids) for sample in samples),
            num_rationales=len(samples),
            num_forced=sum(map(sum, (sample.forced for sample in samples))),
            num_steps=stats.num_steps,
            num_rows=stats.num_rows,
            row_steps=stats.num_row_steps,
            seconds=stats.seconds,
        )


class Generate:
    """transformers' generate in padded batches, one pass per sample; with the papers' hook for the calculator."""

    def __init__(self, setting: Setting, *, with_calculator: bool) -> None:
        self._setting, self._with_calculator = setting, with_calculator
        self._top_k = PAPERS_TOP_K if with_calculator else 0  # the papers' procedure; else the distribution of ours

    @torch.inference_mode()
    def __call__(self, prompts: list[tuple[int, ...]]) -> Outcome:
        from transformers import LogitsProcessorList

        setting, stop = self._setting, self._setting.prompter.stop_id  # which also pads
        num_tokens = num_forced = num_rationales = 0
        for _ in range(setting.num_samples):
            for start in range(0, len(prompts), PAPERS_BATCH):
                batch = prompts[start : start + PAPERS_BATCH]
                width = max(map(len, batch))
                ids = torch.tensor([[stop] * (width - len(prompt)) + list(prompt) for prompt in batch])
                mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
                hook = PapersHook(setting.prompter, width)
                out = setting.model.generate(
                    ids.to(setting.model.device),
                    attention_mask=mask.to(setting.model.device),
                    do_sample=True, temperature=setting.temperature, top_k=self._top_k, top_p=1.0,
                    max_new_tokens=max(map(setting.limit, batch)), eos_token_id=setting.stop_id, pad_token_id=stop,
                    logits_processor=LogitsProcessorList([hook] if self._with_calculator else []),
                )  # fmt: skip
                for prompt, answer in zip(batch, out[:, width:].tolist(), strict=True):
                    length = answer.index(stop) + 1 if setting.stop_id in answer else len(answer)
                    num_tokens += min(length, setting.limit(prompt))
                num_forced += hook.num_forced
                num_rationales += len(batch)
        return Outcome(num_tokens, num_rationales, num_forced)


class PapersHook:
    """The papers' Llama calculator, re-told: at every step decode every row, match an open annotation, force a token.

    Two of its defects are mended so that it works at all here: arithmetic is ours instead of `eval`, and the forced
    token is found by re-encoding the result, where the original indexes tokens by characters.
    """

    def __init__(self, prompter: Prompter, prompt_width: int) -> None:
        self._prompter, self._width, self._calculator = prompter, prompt_width, Calculator()
        self.num_forced = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row in range(input_ids.shape[0]):
            text = self._prompter.tokenizer.decode(input_ids[row][self._width :])
            match = re.search(r"<<([^>=]+)=([^>]*)$", text)
            result = self._calculator(match[1]) if match else None
            if match is None or result is None or not result.startswith(match[2]):
                continue
            ids = self._prompter.encode(result[len(match[2]) :] + ">>")
            scores[row] = torch.full_like(scores[row], -torch.inf)
            scores[row, ids[0]] = 0.0
            self.num_forced += 1
        return scores


class Continuous:
    """transformers' continuous batching: paged cache, no calculator (it has no hook that could force tokens)."""

    def __init__(self, setting: Setting) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self._setting, model = setting, setting.model
        self._attention = model.config._attn_implementation
        longest = max(map(setting.limit, setting.prompts))
        stop = -1 if setting.stop_id is None else setting.stop_id  # -1: none
        config = GenerationConfig(
            do_sample=True, temperature=setting.temperature, top_k=0, max_new_tokens=longest, eos_token_id=stop,
            pad_token_id=setting.prompter.stop_id,
        )  # fmt: skip
        number, prompt = len(setting.prompts) * setting.num_samples, max(map(len, setting.prompts))
        rows, page = min(CONTINUOUS_REQUESTS, number), ContinuousBatchingConfig.page_size
        self._manager = model.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                max_requests_per_batch=rows, max_memory_percent=self._share_of_free(),
                num_blocks=rows * math.ceil((prompt + longest) / page) if model.device.type == "cpu" else None,
            ),
            workload_hints=WorkloadHints(prompt, longest, number),
        )  # fmt: skip
        if model.device.type == "cuda":  # records graphs, which is no part of the time
            self._manager.warmup()
        self._manager.start()

    def _share_of_free(self) -> float | None:
        """Return the share of the GPU's free memory that the cache may take: it does not know of a process's limit."""
        if self._setting.memory_share is None:
            return None
        total, reserved = torch.cuda.mem_get_info()[1], torch.cuda.memory_reserved()
        return 0.8 * max(0.0, self._setting.memory_share * total - reserved) / (total - reserved)

    def __call__(self, prompts: list[tuple[int, ...]]) -> Outcome:
        setting, manager = self._setting, self._manager
        waiting = set()
        for prompt in prompts:
            for _ in range(setting.num_samples):
                waiting.add(manager.add_request(list(prompt), max_new_tokens=setting.limit(prompt)))
        num_tokens = 0
        while waiting:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                waiting.remove(result.request_id)
                num_tokens += len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before its requests")
        return Outcome(num_tokens, len(prompts) * setting.num_samples)

    def close(self) -> None:
        self._manager.stop(block=True, timeout=5)
        self._manager.destroy()
        self._setting.model.set_attn_implementation(self._attention)


class Vllm:
    """vLLM, without a calculator. It loads the weights itself: from the setting's folder, or saved here."""

    def __init__(self, setting: Setting, scratch: Path) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its memory is this process's
        from vllm import LLM

        self._setting = setting
        longest = max(map(len, setting.prompts)) + max(map(setting.limit, setting.prompts))
        if setting.folder is None:
            adapters.save_merged(copy.deepcopy(setting.model), setting.prompter.tokenizer, scratch)
        self._llm = LLM(
            model=str(setting.folder or scratch), load_format="safetensors", skip_tokenizer_init=True, seed=0,
            dtype="bfloat16", max_model_len=longest, max_num_seqs=setting.num_rows, enable_prefix_caching=True,
            gpu_memory_utilization=setting.memory_share or 0.9,
        )  # fmt: skip

    def __call__(self, prompts: list[tuple[int, ...]]) -> Outcome:
        from vllm import SamplingParams

        setting = self._setting
        stop = {"ignore_eos": True} if setting.stop_id is None else {"stop_token_ids": [setting.stop_id]}
        params = [
            SamplingParams(
                n=setting.num_samples, temperature=setting.temperature, max_tokens=setting.limit(prompt),
                detokenize=False, **stop,
            )
            for prompt in prompts
        ]  # fmt: skip
        texts = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = [answer for found in self._llm.generate(texts, params, use_tqdm=False) for answer in found.outputs]
        return Outcome(sum(len(answer.token_ids) for answer in answers), len(answers))


class LlamaCpp:
    """llama.cpp with parallel sequences: prompts are computed once and copied to their samples; numpy draws."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        import llama_cpp
        from llama_cpp import _internals

        from dpost_lite.local.gguf import write_gguf
        from dpost_lite.local.llama import open_gguf, uses_extra_buffers

        self._setting, self._llama_cpp = setting, llama_cpp
        adapters.save_merged(copy.deepcopy(setting.model), setting.prompter.tokenizer, folder)  # rounds to 16 bit
        path = write_gguf(folder, folder / "model-f16.gguf", dtype="f16")
        self._llm = open_gguf(path, extra_buffers=uses_extra_buffers(path), n_ctx=64, n_threads=torch.get_num_threads())
        params = llama_cpp.llama_context_default_params()
        longest = max(map(len, setting.prompts)) + setting.max_new_tokens
        params.n_seq_max = LLAMA_SEQUENCES + LLAMA_PROMPTS
        params.n_ctx = params.n_seq_max * (longest + 8)  # each sequence has its own part: attention reads no other's
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._ctx = _internals.LlamaContext(model=self._llm._model, params=params, verbose=False)
        self._batch = _internals.LlamaBatch(n_tokens=2048, embd=0, n_seq_max=params.n_seq_max, verbose=False)

    def __call__(self, prompts: list[tuple[int, ...]]) -> Outcome:
        import numpy as np

        setting, generator = self._setting, np.random.default_rng(0)
        waiting, held = list(prompts)[::-1], []  # held: [sequence, its length, logits, samples still to start]
        free, free_prompts = (
            list(range(LLAMA_SEQUENCES))[::-1],
            [LLAMA_SEQUENCES + i for i in range(LLAMA_PROMPTS)][::-1],
        )
        running: dict[int, list[int]] = {}  # sequence -> [position, tokens written, newest token]
        num_tokens = num_rationales = 0
        while waiting or held or running:
            while free and (held or waiting):
                if not held:
                    free_prompts.sort(reverse=True)
                    batch = [(free_prompts.pop(), waiting.pop()) for _ in range(min(len(waiting), LLAMA_PROMPTS))]
                    logits = self._decode([(s, p, t, p == len(ids) - 1) for s, ids in batch for p, t in enumerate(ids)])
                    held = [
                        [s, len(ids), row, setting.num_samples] for (s, ids), row in zip(batch, logits, strict=True)
                    ]
                source, length, row, _ = held[0]
                self._ctx.kv_cache_seq_cp(source, free[-1], -1, -1)
                running[free.pop()] = [length, 1, self._draw(row[None], generator)[0]]
                held[0][3] -= 1
                if not held[0][3]:
                    self._ctx.kv_cache_seq_rm(source, -1, -1)
                    free_prompts.append(held.pop(0)[0])
            for seq, (_, written, newest) in list(running.items()):
                if newest == setting.prompter.stop_id or written >= setting.max_new_tokens:
                    num_tokens += written
                    num_rationales += 1
                    del running[seq]
                    self._ctx.kv_cache_seq_rm(seq, -1, -1)
                    free.append(seq)
            free.sort(reverse=True)
            running = dict(sorted(running.items()))  # it computes neighbouring sequences together, in this order
            if running:
                logits = self._decode([(seq, state[0], state[2], True) for seq, state in running.items()])
                for state, token in zip(running.values(), self._draw(logits, generator), strict=True):
                    state[:] = state[0] + 1, state[1] + 1, token
        return Outcome(num_tokens, num_rationales)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> Any:
        """Compute (sequence, position, token, wants logits) entries; return the logits that were asked for."""
        import numpy as np

        raw = self._batch.batch
        raw.n_tokens = len(entries)
        for i, (seq, position, token, wants_logits) in enumerate(entries):
            raw.token[i], raw.pos[i], raw.n_seq_id[i], raw.seq_id[i][0], raw.logits[i] = (
                token, position, 1, seq, wants_logits,
            )  # fmt: skip
        self._ctx.decode(self._batch)
        size = self._llm.n_vocab()
        asked = [i for i, entry in enumerate(entries) if entry[3]]
        return np.stack([np.ctypeslib.as_array(self._ctx.get_logits_ith(i), shape=(size,)) for i in asked])

    def _draw(self, logits: Any, generator: Any) -> list[int]:
        import numpy as np

        scaled = (logits - logits.max(axis=1, keepdims=True)) / self._setting.temperature
        cumulative = np.exp(scaled).cumsum(axis=1)
        drawn = (cumulative < generator.random((len(logits), 1)) * cumulative[:, -1:]).sum(axis=1)
        return [int(token) for token in drawn]


def machine_rates(device: torch.device, dtype: torch.dtype, size: int = 2048) -> dict[str, float]:
    """Measure a device's memory bandwidth (GB/s, reading) and matrix rate (GFLOP/s) in a type."""
    block = torch.zeros(256 * 2**20 // dtype.itemsize, dtype=dtype, device=device)
    bandwidth = block.nbytes / best_of(lambda: block.sum()) / 1e9
    a = torch.randn(size, size, device=device, dtype=dtype)
    matrix = 2 * size**3 / best_of(lambda: a @ a) / 1e9
    return {"bandwidth_gb_s": bandwidth, "matrix_gflop_s": matrix}


def best_of(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the shortest of a few timings, in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def ceiling(
    ours: Mapping[str, float], rates: Mapping[str, float], *, weight_bytes: float, num_weights: float,
    position_bytes: float, prompt: float, num_rationales: int,
) -> dict[str, float]:  # fmt: skip
    """Return the tokens per second that a step's reading (weights and cache once) and arithmetic allow, and our share.

    `weight_bytes` and `num_weights` are those that a step reads and multiplies, `position_bytes` those of keys and
    values of a token, `prompt` the tokens of a prompt, divided by the rationales that share it.
    """
    rows = ours["occupancy"] * ours["rows"]
    cache = position_bytes * (prompt + ours["tokens_per_rationale"] / 2) * rows
    tokens_per_step = ours["tokens_per_rationale"] * num_rationales / ours["steps"]
    reading = (weight_bytes + cache) / rates["bandwidth_gb_s"] / 1e9
    arithmetic = 2 * num_weights * tokens_per_step / rates["matrix_gflop_s"] / 1e9
    most = tokens_per_step / max(reading, arithmetic)
    return {
        "tokens_per_step": tokens_per_step, "reading_ms": reading * 1e3, "arithmetic_ms": arithmetic * 1e3,
        "ceiling_tokens_per_s": most, "reached": ours["tokens_per_s"] / most,
        "bandwidth_reached": ours["tokens_per_s"] * reading / tokens_per_step,
    }  # fmt: skip


def print_ceiling(setting: Setting, ours: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """Print what share of the ceiling was reached: reading weights and cache once a step, or the arithmetic."""
    model, config = setting.model, setting.model.config
    num_weights = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:  # of which a step reads a row a token
        num_weights -= model.get_input_embeddings().weight.numel()
    heads, head_dim = kv_shape(config)
    reached = ceiling(
        ours, rates, weight_bytes=num_weights * model.dtype.itemsize, num_weights=num_weights,
        position_bytes=2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize,
        prompt=sum(map(len, setting.prompts)) / len(setting.prompts) / setting.num_samples,
        num_rationales=len(setting.prompts) * setting.num_samples,
    )  # fmt: skip
    print(
        f"\nceiling: a step of {reached['tokens_per_step']:.0f} tokens takes {reached['reading_ms']:.0f} ms to read "
        f"and {reached['arithmetic_ms']:.0f} ms to multiply, so {reached['ceiling_tokens_per_s']:.0f} tok/s; "
        f"reached {reached['reached']:.0%}"
    )
    parts = {key.removeprefix("seconds_"): value for key, value in ours.items() if key.startswith("seconds_")}
    total = sum(parts.values())
    print("time in " + ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in parts.items()))
    if model.device.type == "cpu":  # on a GPU the host waits for the forward in "choose"
        reached["outside_forward"] = 1 - (parts["forward"] + parts["prefill"]) / total
        print(f"outside the forward and the prefill: {reached['outside_forward']:.1%}")
    return reached


def print_ratios(rows: dict[str, dict[str, float]], result: dict[str, Any]) -> None:
    """Print the figures that were aimed at: 6 times the papers' procedure, ahead of all others, calculator for free."""
    if {"ours", "papers"} <= rows.keys():
        result["against_papers"] = rows["ours"]["tokens_per_s"] / rows["papers"]["tokens_per_s"]
        print(f"ours against the papers' procedure: {result['against_papers']:.1f}x useful tokens per second")
    others = rows.keys() - {"ours", "ours-off"}
    if "ours" in rows and others:
        best = max(others, key=lambda name: rows[name]["tokens_per_s"])
        result["against_best"] = {best: rows["ours"]["tokens_per_s"] / rows[best]["tokens_per_s"]}
        print(f"ours against the best of the others, {best}: {result['against_best'][best]:.2f}x")
    if {"ours", "ours-off"} <= rows.keys():
        result["calculator_on_off"] = rows["ours"]["rationales_per_s"] / rows["ours-off"]["rationales_per_s"]
        print(f"calculator on against off: {result['calculator_on_off']:.2f}x rationales per second")


def sweep(setting: Setting, data_dir: Path | None) -> list[dict[str, float]]:
    """Throughput by number of rows and by K, each with at least twice as many samples as rows: they are refilled."""
    points = [(rows, setting.num_samples) for rows in (1, 8, 32, 64, 128, 256, 512)]
    points += [(64, samples) for samples in (1, 4, 10)]
    table = []
    for num_rows, num_samples in points:
        prompts = read_prompts(setting.prompter, data_dir, max(2, math.ceil(2 * num_rows / num_samples)))
        part = replace(setting, num_rows=num_rows, num_samples=num_samples, prompts=prompts)
        row = measure("ours", part, repeats=1)
        table.append({"rows": num_rows, "samples": num_samples, "tokens_per_s": row["tokens_per_s"]})
        print(f"rows {num_rows:>4}  K {num_samples:>3}  {row['tokens_per_s']:8.1f} tok/s")
    return table


if __name__ == "__main__":
    main()
