"""The inputs of one decode step: which tokens enter, where their keys go, and what each of them attends to.

A step is described by its `StepShape`, a handful of sizes, and its `StepInputs`, numbers that are packed into one flat
tensor whose order depends on the shape alone. So a step takes one copy to the device, and steps of equal shape differ
only in these numbers: a CUDA graph can be replayed on new ones.

The flat batch begins with the extra tokens (all but the last of a row that got several at once), followed by the last
token of every row, in the order of the rows. A row with extra tokens is a multi-token row: its extra tokens attend to
row and prompt by themselves. The last tokens are grouped by row segments for the rows, and by prompt for the prompts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from typing import Generic, TypeVar

import torch

from dpost_lite.sampling.attention import Decode, Kernel, Part
from dpost_lite.sampling.cache import KVCache
from dpost_lite.sampling.request import CacheSize
from dpost_lite.sampling.scheduler import Prompt, Row

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of one step. `segments` are `(first row, last row + 1, positions read)`: rows of similar length."""

    num_rows: int
    num_extra: int  # tokens
    num_multi: int  # rows with extra tokens
    multi_width: int  # most extra tokens of a row
    multi_length: int  # positions read of such a row
    num_prompts: int
    prompt_width: int  # most rows of a prompt
    prompt_length: int
    segments: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, rows: list[Row], prompts: list[Prompt], segment_rows: int) -> "StepShape":
        """Return the exact sizes of the next step of these rows."""
        multi = [row for row in rows if len(row.unread) > 1]
        segments: list[tuple[int, int, int]] = []
        for start in range(0, len(rows), segment_rows):
            part = rows[start : start + segment_rows]
            stop, length = start + len(part), _end(part)
            if segments and abs(segments[-1][2] - length) * 8 <= length:  # similar length: one product beats two
                start, _, longest = segments.pop()
                length = max(length, longest)
            segments.append((start, stop, length))
        return cls(
            num_rows=len(rows),
            num_extra=sum(len(row.unread) - 1 for row in multi),
            num_multi=len(multi),
            multi_width=max((len(row.unread) - 1 for row in multi), default=0),
            multi_length=_end(multi),
            num_prompts=len(prompts),
            prompt_width=max(prompt.num_running for prompt in prompts),
            prompt_length=max(prompt.length for prompt in prompts),
            segments=tuple(segments),
        )

    def padded(self, size: CacheSize) -> "StepShape":
        """Return one of few shapes that holds this one, so that CUDA graphs can be reused. `size` limits it."""
        num_rows = min(_power_of_two(self.num_rows), size.num_rows)
        length = max(length for *_, length in self.segments)
        return replace(
            self,
            num_rows=num_rows,
            num_extra=_power_of_two(self.num_extra, 8) if self.num_multi else 0,
            num_multi=_power_of_two(self.num_multi, 8) if self.num_multi else 0,
            multi_width=_power_of_two(self.multi_width, 8) if self.num_multi else 0,
            multi_length=size.row_length,
            num_prompts=min(_power_of_two(self.num_prompts), size.num_prompts),
            prompt_width=_power_of_two(self.prompt_width),
            prompt_length=size.prompt_length,
            segments=((0, num_rows, min(multiple_of(64, length), size.row_length)),),
        )

    @property
    def num_positions_read(self) -> int:
        """Row positions that attention reads in one layer, of the last tokens."""
        return sum((stop - start) * length for start, stop, length in self.segments)


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Value]):
    """All numbers of one step: as lists (`of`, `pack`), or as views of one tensor (`unpack`, `plan`).

    Shapes are those of `sizes`. Fields that begin with `multi` are about extra tokens, with `prompt` about last tokens
    grouped by prompt; see `attention.Part` for `max_key_position`, `query_position` and `scatter_index`.
    """

    ids: Value
    row: Value  # the token's row in the cache
    position: Value  # the token's position in its row
    absolute_position: Value  # counted from the start of the prompt
    multi_tokens: Value
    multi_query_position: Value  # in the row
    multi_absolute_position: Value
    multi_scatter_index: Value
    multi_rows: Value
    multi_prompts: Value
    multi_prompt_max_key_position: Value
    prompt_tokens: Value
    prompt_query_position: Value
    prompt_max_key_position: Value
    prompt_scatter_index: Value

    @classmethod
    def sizes(cls, shape: StepShape) -> "StepInputs[tuple[int, ...]]":
        """Return the size of each field in a step of this shape."""
        tokens = (shape.num_extra + shape.num_rows,)
        multi, by_prompt = (shape.num_multi, shape.multi_width), (shape.num_prompts, shape.prompt_width)
        return StepInputs(
            ids=tokens, row=tokens, position=tokens, absolute_position=tokens,
            multi_tokens=multi, multi_query_position=multi, multi_absolute_position=multi,
            multi_scatter_index=(shape.num_extra,), multi_rows=multi[:1], multi_prompts=multi[:1],
            multi_prompt_max_key_position=(shape.num_multi, 1),
            prompt_tokens=by_prompt, prompt_query_position=by_prompt,
            prompt_max_key_position=(shape.num_prompts, 1), prompt_scatter_index=(shape.num_rows,),
        )  # fmt: skip

    @classmethod
    def of(cls, rows: list[Row], prompts: list[Prompt], shape: StepShape, scratch_row: int) -> "StepInputs[list[int]]":
        """Return the numbers of the next step, padded to `shape`; padding tokens are written to `scratch_row`."""
        inputs = StepInputs(*([0] * math.prod(size) for size in cls.sizes(shape).values()))
        inputs.row[:] = [scratch_row] * len(inputs.row)
        _fill_tokens(inputs, rows, shape)
        _fill_multi(inputs, [row for row in rows if len(row.unread) > 1], shape)
        _fill_prompts(inputs, rows, prompts, shape)
        return inputs

    def values(self) -> list[Value]:
        """Return the fields' values in order."""
        return [getattr(self, name) for name in _FIELDS]

    def pack(self: "StepInputs[list[int]]", *, pin_memory: bool = False) -> torch.Tensor:
        """Return all numbers as one flat tensor on the CPU."""
        return torch.tensor(list(chain.from_iterable(self.values())), pin_memory=pin_memory)

    @classmethod
    def unpack(cls, packed: torch.Tensor, shape: StepShape) -> "StepInputs[torch.Tensor]":
        """Return the fields as views of a packed tensor: writing new numbers there makes a new step."""
        sizes = cls.sizes(shape).values()
        ends = list(accumulate(math.prod(size) for size in sizes))
        return StepInputs(
            *(packed[start:end].view(size) for start, end, size in zip([0, *ends], ends, sizes, strict=False))
        )

    def plan(self: "StepInputs[torch.Tensor]", shape: StepShape, cache: KVCache, kernel: Kernel | None) -> Decode:
        """Return what attention reads and writes in this step."""
        of_rows, of_prompts = [], []
        if shape.num_multi:
            tokens, index = self.multi_tokens, self.multi_scatter_index
            query = self.multi_query_position
            of_rows.append(Part(tokens, self.multi_rows, shape.multi_length, query, query, index))
            max_key, query = self.multi_prompt_max_key_position, self.multi_absolute_position
            of_prompts.append(Part(tokens, self.multi_prompts, shape.prompt_length, max_key, query, index))
        last = self.position[shape.num_extra :, None]
        for start, stop, length in shape.segments:
            tokens_of = slice(shape.num_extra + start, shape.num_extra + stop)
            of_rows.append(Part(tokens_of, slice(start, stop), length, last[start:stop], last[start:stop]))
        slots, max_key, query = slice(0, shape.num_prompts), self.prompt_max_key_position, self.prompt_query_position
        index = self.prompt_scatter_index
        of_prompts.append(Part(self.prompt_tokens, slots, shape.prompt_length, max_key, query, index))
        return Decode(cache, self.row, self.position, of_rows, of_prompts, kernel)


_FIELDS = [field.name for field in fields(StepInputs)]


def _fill_tokens(inputs: StepInputs[list[int]], rows: list[Row], shape: StepShape) -> None:
    """Fill what is known of every token: extra ones first, then the last ones."""
    last = slice(shape.num_extra, shape.num_extra + len(rows))
    ends = [row.length + len(row.unread) - 1 for row in rows]
    inputs.ids[last] = [row.unread[-1] for row in rows]
    inputs.row[last] = range(len(rows))
    inputs.position[last] = ends
    inputs.absolute_position[last] = [row.prompt.length + end for row, end in zip(rows, ends, strict=True)]
    extra = [(row, column) for row in rows if len(row.unread) > 1 for column in range(len(row.unread) - 1)]
    inputs.ids[: len(extra)] = [row.unread[column] for row, column in extra]
    inputs.row[: len(extra)] = [row.slot for row, _ in extra]
    inputs.position[: len(extra)] = [row.length + column for row, column in extra]
    inputs.absolute_position[: len(extra)] = [row.prompt.length + row.length + column for row, column in extra]


def _fill_multi(inputs: StepInputs[list[int]], multi: list[Row], shape: StepShape) -> None:
    """Fill what the extra tokens attend to."""
    token = 0
    for m, row in enumerate(multi):
        inputs.multi_rows[m], inputs.multi_prompts[m] = row.slot, row.prompt.slot
        inputs.multi_prompt_max_key_position[m] = row.prompt.length - 1
        for column in range(len(row.unread) - 1):
            index = m * shape.multi_width + column
            inputs.multi_tokens[index] = token
            inputs.multi_query_position[index] = row.length + column
            inputs.multi_absolute_position[index] = row.prompt.length + row.length + column
            inputs.multi_scatter_index[token] = index
            token += 1


def _fill_prompts(inputs: StepInputs[list[int]], rows: list[Row], prompts: list[Prompt], shape: StepShape) -> None:
    """Group the last tokens by prompt."""
    inputs.prompt_max_key_position[: len(prompts)] = [prompt.length - 1 for prompt in prompts]
    next_index = [slot * shape.prompt_width for slot in range(len(prompts))]
    for token, row in enumerate(rows, start=shape.num_extra):
        slot = row.prompt.slot
        index = next_index[slot]
        next_index[slot] += 1
        inputs.prompt_tokens[index] = token
        inputs.prompt_query_position[index] = inputs.absolute_position[token]
        inputs.prompt_scatter_index[token - shape.num_extra] = index


def _end(rows: Iterable[Row]) -> int:
    """Positions that the longest of these rows has after the step."""
    return max((row.length + len(row.unread) for row in rows), default=0)


def _power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `number`."""
    return max(least, 1 << (number - 1).bit_length())


def multiple_of(unit: int, length: int) -> int:
    """Return the smallest multiple of `unit` that is at least `length`."""
    return -(-length // unit) * unit
