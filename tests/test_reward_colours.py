"""The colours behind tokens: their scale, and whether text on them can be read."""

import re
from pathlib import Path

import pytest

from dpost_lite import report
from dpost_lite.problems.records import RewardedRationale
from dpost_lite.report import figures
from dpost_lite.report.examples import reward_scale, shaded

STYLE = (Path(report.__file__).parent / "page.html.jinja").read_text(encoding="utf-8")


def rationale(*rewards: float, tokens: tuple[str, ...] | None = None) -> RewardedRationale:
    return RewardedRationale("1", "How many?", "2", "", tokens or ("a",) * len(rewards), rewards)


def test_the_scale_leaves_a_few_large_rewards_beyond_its_ends():
    many = rationale(*(i / 100 for i in range(100)), -5.0)
    assert reward_scale([many]) == 0.95
    assert reward_scale([rationale(0.1), rationale(-0.3)]) == 0.1
    assert reward_scale([rationale(0.0, 0.0, 0.0, -0.2)]) == 0.2
    assert reward_scale([rationale(0.0)]) == reward_scale([rationale()]) == reward_scale([]) == 0


def test_a_shade_is_a_part_of_the_scale():
    found = shaded(rationale(0.1, -0.05, -3.0, 0.0, tokens=("x", ".\n", "", "y")), 0.1)
    assert [token.shade for token in found.tokens] == [1, -0.5, -1, 0]
    assert [token.text for token in found.tokens] == ["x", ".↵\n", "∎", "y"]
    assert [token.shade for token in shaded(rationale(0.0), 0.0).tokens] == [0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("side", ["raised", "lowered"])
def test_text_is_readable_on_every_shade(scheme, side):
    colors = dict(zip(("light", "dark"), re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL), strict=True))[scheme]
    ink, box = (hexadecimal(re.search(rf"--{name}: (#\w+)", colors)[1]) for name in ("ink", "box"))
    end = tuple(map(int, re.search(rf"--{side}: (\d+) (\d+) (\d+)", colors).groups()))
    if scheme == "light":
        assert end == hexadecimal(getattr(figures, side.upper()))
    for shade in range(101):
        mixed = tuple(b + (e - b) * shade / 100 for b, e in zip(box, end, strict=True))
        assert contrast(ink, mixed) >= 4.5
        assert scheme == "dark" or contrast(hexadecimal(figures.INK), mixed) >= 4.5


def test_text_is_laid_out_in_lines():
    pieces = [
        ("One", 1.0),
        (" two", 0.5),
        ("th", -1.0),
        ("ree", 0.0),
        ("↵\n", None),
        ("\n", 0.1),
        ("123456789012", 0.2),
    ]
    lines = figures._wrapped(pieces, 8)
    assert ["".join(text for text, _ in line) for line in lines] == [
        "One",
        " twoth",
        "ree↵",
        "",
        "12345678",
        "9012",
    ]
    assert lines[0] == [("One", 1.0)]


def hexadecimal(color: str) -> tuple[int, ...]:
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Of two colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def luminance(color: tuple[float, ...]) -> float:
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
