"""How one decode step is laid out: which tokens enter, where their keys go, and what each of them looks at.

A step is described twice: by its `Shape`, a handful of sizes, and by one flat list of numbers whose order depends on
the shape alone. So a step takes one copy to the device, and steps of equal shape differ in nothing but these numbers:
a CUDA graph can be replayed on them.

The flat batch begins with the extra tokens (of a row that got several at once, all but the last), then comes the last
token of every row, in the order of the rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from dpost_lite.problems.forcing import RowForcer
from dpost_lite.sampling.kvcache import Decode, KVCache, Part
from dpost_lite.sampling.request import Request, Sample


@dataclass(slots=True, eq=False)
class Prompt:
    """A computed prompt: `todo` samples wait for a row, `num_running` have one. `slot` is its place in the cache."""

    request: Request
    todo: list[int]
    slot: int
    logits: torch.Tensor  # (vocabulary,), of the first answer token
    num_running: int = 0

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return len(self.request.read_ids)


@dataclass(slots=True, eq=False)
class Row:
    """One running sample: `length` of its tokens are cached, `pending` ones are written and not yet read."""

    prompt: Prompt
    sample: Sample
    forcer: RowForcer | None
    slot: int
    length: int = 0
    pending: list[int] = field(default_factory=list)
    owed: list[int] = field(default_factory=list)  # what the calculator still has to write of the prefix's annotation
    num_drawn: int = 0
    num_steps: int = 0

    @property
    def temperature(self) -> float:
        """Of the next token, by the step of the rationale that it belongs to."""
        schedule = self.prompt.request.temperature
        return schedule[min(self.num_steps, len(schedule) - 1)] if isinstance(schedule, tuple) else schedule

    def take(self, token_id: int, logprob: float, *, ends_step: bool) -> bool:
        """Write the newest token and what the calculator makes of it; return True when the answer is finished."""
        request, sample = self.prompt.request, self.sample
        owed, self.owed = self.owed, []
        ids = owed or (self.forcer.push(token_id) if self.forcer else None)
        room = request.max_new_tokens - len(sample.token_ids)
        self.num_drawn += 1
        self.pending = ([token_id] if ids is None else ids)[:room]
        is_kept = not owed and self.pending[0] == token_id
        self.num_steps += is_kept and ends_step
        sample.token_ids += self.pending
        sample.forced += [not is_kept] + [True] * (len(self.pending) - 1)
        sample.logprobs += [logprob if is_kept else 0.0] + [0.0] * (len(self.pending) - 1)
        if is_kept and token_id in request.stop_ids:
            sample.end = "stop"
        elif len(sample.token_ids) < request.max_new_tokens:
            return False
        if self.forcer:
            sample.num_calculated, sample.num_refused = self.forcer.num_calculated, self.forcer.num_refused
        return True


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one step. `segments` are `(first row, last row + 1, positions read)`: rows of like length."""

    num_rows: int
    num_extra: int  # tokens
    num_many: int  # rows with extra tokens
    many_width: int  # most extra tokens of a row
    many_length: int  # positions read of such a row
    num_prompts: int
    prompt_width: int  # most rows of a prompt
    prompt_length: int
    segments: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, rows: list[Row], prompts: list[Prompt], segment_rows: int) -> "Shape":
        """Return the exact sizes of the next step of these rows."""
        many = [row for row in rows if len(row.pending) > 1]
        segments: list[tuple[int, int, int]] = []
        for start in range(0, len(rows), segment_rows):
            part = rows[start : start + segment_rows]
            stop, length = start + len(part), _end(part)
            if segments and abs(segments[-1][2] - length) * 8 <= length:  # about as long: one product beats two
                start, _, longest = segments.pop()
                length = max(length, longest)
            segments.append((start, stop, length))
        return cls(
            num_rows=len(rows),
            num_extra=sum(len(row.pending) - 1 for row in many),
            num_many=len(many),
            many_width=max((len(row.pending) - 1 for row in many), default=0),
            many_length=_end(many),
            num_prompts=len(prompts),
            prompt_width=max(prompt.num_running for prompt in prompts),
            prompt_length=max(prompt.length for prompt in prompts),
            segments=tuple(segments),
        )

    def rounded(self, cache: KVCache) -> "Shape":
        """Return one of few shapes that holds this one, so that graphs repeat; `cache` sets the upper bounds."""
        num_rows = min(_power_of_two(self.num_rows), cache.num_rows)
        length = max(length for *_, length in self.segments)
        num_many = _power_of_two(self.num_many, 8) if self.num_many else 0
        many_width = _power_of_two(self.many_width, 8) if self.num_many else 0
        return replace(
            self,
            num_rows=num_rows,
            num_extra=_power_of_two(self.num_extra, 8) if self.num_many else 0,
            num_many=num_many,
            many_width=many_width,
            many_length=cache.row_length,
            num_prompts=min(_power_of_two(self.num_prompts), cache.num_prompts),
            prompt_width=_power_of_two(self.prompt_width),
            prompt_length=cache.prompt_length,
            segments=((0, num_rows, min(multiple_of(64, length), cache.row_length)),),
        )

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and sizes of the numbers that describe a step of this shape, in their order."""
        tokens = (self.num_extra + self.num_rows,)
        many, asked = (self.num_many, self.many_width), (self.num_prompts, self.prompt_width)
        return {
            "ids": tokens, "row": tokens, "position": tokens, "absolute": tokens,
            "many_tokens": many, "many_last": many, "many_at": many, "many_place": (self.num_extra,),
            "many_rows": many[:1], "many_prompts": many[:1], "many_prompt_last": (self.num_many, 1),
            "asked_tokens": asked, "asked_at": asked, "asked_last": (self.num_prompts, 1),
            "asked_place": (self.num_rows,),
        }  # fmt: skip


def lay_out(rows: list[Row], prompts: list[Prompt], shape: Shape, scratch_row: int) -> list[int]:
    """Return the numbers of the next step, padded to `shape`; padding writes to `scratch_row` or to rows not in use."""
    many = [row for row in rows if len(row.pending) > 1]
    extra = [(m, column, row) for m, row in enumerate(many) for column in range(len(row.pending) - 1)]
    num_extra, num_rows = len(extra), len(rows)
    end = [row.length + len(row.pending) - 1 for row in rows]  # position of the last token in its row
    extra_end = [row.length + column for _, column, row in extra]
    numbers: dict[str, list[int]] = {
        name: [0] * (size[0] if len(size) == 1 else size[0] * size[1]) for name, size in shape.sizes().items()
    }

    def by_token(name: str, of_extra: list[int], of_rows: list[int]) -> None:
        numbers[name][:num_extra] = of_extra
        numbers[name][shape.num_extra : shape.num_extra + num_rows] = of_rows

    numbers["row"] = [scratch_row] * shape.num_extra + list(range(shape.num_rows))
    by_token("row", [row.slot for *_, row in extra], list(range(num_rows)))
    by_token("ids", [row.pending[column] for _, column, row in extra], [row.pending[-1] for row in rows])
    by_token("position", extra_end, end)
    absolute = [row.prompt.length + e for row, e in zip(rows, end, strict=True)]
    extra_absolute = [row.prompt.length + e for (*_, row), e in zip(extra, extra_end, strict=True)]
    by_token("absolute", extra_absolute, absolute)
    for token, (m, column, _) in enumerate(extra):
        place = m * shape.many_width + column
        numbers["many_tokens"][place] = token
        numbers["many_last"][place] = extra_end[token]
        numbers["many_at"][place] = extra_absolute[token]
        numbers["many_place"][token] = place
    for m, row in enumerate(many):
        numbers["many_rows"][m], numbers["many_prompts"][m] = row.slot, row.prompt.slot
        numbers["many_prompt_last"][m] = row.prompt.length - 1
    numbers["asked_last"][: len(prompts)] = [prompt.length - 1 for prompt in prompts]
    num_asked = [0] * len(prompts)
    for token, row in enumerate(rows):
        place = row.prompt.slot * shape.prompt_width + num_asked[row.prompt.slot]
        num_asked[row.prompt.slot] += 1
        numbers["asked_tokens"][place] = shape.num_extra + token
        numbers["asked_at"][place] = absolute[token]
        numbers["asked_place"][token] = place
    return [number for name in shape.sizes() for number in numbers[name]]


def bind(numbers: torch.Tensor, shape: Shape, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor, Decode]:
    """Return token ids, positions and plan of a step as views of its numbers: writing new ones there is a new step."""
    sizes = shape.sizes()
    counts = [size[0] if len(size) == 1 else size[0] * size[1] for size in sizes.values()]
    ends = list(accumulate(counts))
    t = {
        name: numbers[end - count : end].view(size)
        for (name, size), count, end in zip(sizes.items(), counts, ends, strict=True)
    }
    own, prompts = [], []
    if shape.num_many:
        tokens, place = t["many_tokens"], t["many_place"]
        own.append(Part(tokens, t["many_rows"], shape.many_length, t["many_last"], t["many_last"], place))
        prompts.append(Part(tokens, t["many_prompts"], shape.prompt_length, t["many_prompt_last"], t["many_at"], place))
    last = t["position"][shape.num_extra :, None]
    for start, end, length in shape.segments:
        tokens_of = slice(shape.num_extra + start, shape.num_extra + end)
        own.append(Part(tokens_of, slice(start, end), length, last[start:end], last[start:end]))
    asked = slice(0, shape.num_prompts)
    prompts.append(
        Part(t["asked_tokens"], asked, shape.prompt_length, t["asked_last"], t["asked_at"], t["asked_place"])
    )
    return t["ids"], t["absolute"], Decode(cache, t["row"], t["position"], own, prompts)


def _end(rows: Iterable[Row]) -> int:
    """Positions that the longest of these rows has after the step."""
    return max((row.length + len(row.pending) for row in rows), default=0)


def _power_of_two(number: int, least: int = 1) -> int:
    """Return the next power of two from `number` on."""
    return max(least, 1 << (number - 1).bit_length())


def multiple_of(unit: int, length: int) -> int:
    """Return the next multiple of `unit` from `length` on."""
    return -(-length // unit) * unit
