"""Our two readings of an answer against lm-evaluation-harness's GSM8K filters, on 200 real outputs.

Its package would bring a dozen others, so its filters are told again here from its documented task: the patterns of
`strict-match` and `flexible-extract` and what its exact match ignores. The outputs are greedy answers of
SmolLM2-135M-Instruct with a LoRA adapter to GSM8K's first 200 test problems (`dpost-lite eval ADAPTER --data gsm8k
--limit 200 --calculator on`); those that were cut off go on without end, as they were.
"""

import re
from pathlib import Path

import pytest

from dpost_lite.problems.grading import flexible_answer, same_number, strict_answer
from dpost_lite.problems.records import GradedAnswer, read_jsonl

OUTPUTS = list(read_jsonl(Path(__file__).with_name("outputs.jsonl"), GradedAnswer))
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def strict_match(text: str) -> str:
    """Its first `#### N`."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return found[0].strip() if found else "[invalid]"


def flexible_extract(text: str) -> str:
    """Its last number."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next(group for group in found[-1] if group).strip() if found else "[invalid]"


def exact_match(a: str, b: str) -> bool:
    """Equal but for what it ignores."""
    for pattern in IGNORED:
        a, b = re.sub(pattern, "", a), re.sub(pattern, "", b)
    return a == b


@pytest.mark.parametrize(("ours", "theirs"), [(strict_answer, strict_match), (flexible_answer, flexible_extract)])
def test_the_same_answers_are_right(ours, theirs):
    assert len(OUTPUTS) == 200
    right = [same_number(ours(output.text), output.answer) for output in OUTPUTS]
    assert right == [exact_match(theirs(output.text), output.answer) for output in OUTPUTS]
    assert 5 < sum(right) < 195


def test_the_same_numbers_are_read():
    """But for trailing dots and commas, which its patterns take for part of a number."""
    for output in OUTPUTS:
        theirs = strict_match(output.text)
        assert (strict_answer(output.text) is None) == (theirs == "[invalid]")
        if theirs != "[invalid]":
            assert same_number(strict_answer(output.text), theirs.rstrip(".,"))
