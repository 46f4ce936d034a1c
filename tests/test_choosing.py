"""Drawing one token a row: greedy, temperature, top-p, and the uniform number that belongs to the row alone."""

import math

import pytest

torch = pytest.importorskip("torch")

from dpost_lite.sampling.choosing import choose, uniform_number  # noqa: E402

LOGITS = [2.0, 0.5, -1.0, 1.2, -3.0, 0.0]


def draw(
    logits: list[float],
    temperature: float,
    top_p: float = 1.0,
    num_draws: int = 4000,
    seed: int = 1,
    top_k: int | None = None,
) -> tuple[list[int], list[float]]:
    """Draw from the same logits at many steps of one row."""
    tokens, logprobs = choose(
        torch.tensor(logits).repeat(num_draws, 1),
        temperature=[temperature] * num_draws,
        top_k=[top_k] * num_draws,
        top_p=[top_p] * num_draws,
        seed=[seed] * num_draws,
        step=list(range(num_draws)),
    )
    return tokens.tolist(), logprobs.tolist()


def probabilities(logits: list[float], temperature: float, top_p: float = 1.0, top_k: int | None = None) -> list[float]:
    """Temperature, then the `top_k` likeliest, then the smallest set of them that holds `top_p`, spelled out."""
    weights = [math.exp(x / temperature) for x in logits]
    if top_k is not None:
        least = sorted(weights, reverse=True)[min(top_k, len(weights)) - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    probs = [w / sum(weights) for w in weights]
    kept, mass = set(), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass < top_p:
            kept.add(i)
            mass += probs[i]
    return [p / mass if i in kept else 0.0 for i, p in enumerate(probs)]


def assert_follows(tokens: list[int], probs: list[float]) -> None:
    """Every frequency within four standard deviations; what is impossible never comes."""
    for i, p in enumerate(probs):
        frequency = tokens.count(i) / len(tokens)
        assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / len(tokens)), (i, frequency, p)


def test_greedy_is_the_largest_logit_whatever_seed_and_top_p():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    greedy = [0.0] * 50
    tokens, _ = choose(
        logits, temperature=greedy, top_k=[None] * 50, top_p=[0.1] * 50, seed=list(range(50)), step=[3] * 50
    )
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_log_probabilities_are_at_temperature_one_without_top_p():
    for temperature, top_p in [(0.0, 1.0), (0.3, 1.0), (2.0, 0.5)]:
        tokens, logprobs = draw(LOGITS, temperature, top_p, num_draws=200)
        expected = torch.tensor(LOGITS).log_softmax(-1)
        assert logprobs == pytest.approx([expected[token].item() for token in tokens], abs=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 3.0])
def test_temperature(temperature):
    tokens, _ = draw(LOGITS, temperature)
    assert_follows(tokens, probabilities(LOGITS, temperature))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_top_p_keeps_the_smallest_set_that_holds_it(temperature, top_p):
    tokens, _ = draw(LOGITS, temperature, top_p)
    probs = probabilities(LOGITS, temperature, top_p)
    assert set(tokens) <= {i for i, p in enumerate(probs) if p}
    assert_follows(tokens, probs)


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 50])
@pytest.mark.parametrize("top_p", [0.6, 1.0])
def test_top_k_keeps_the_likeliest_and_goes_before_top_p(top_k, top_p):
    tokens, _ = draw(LOGITS, 1.0, top_p, top_k=top_k)
    probs = probabilities(LOGITS, 1.0, top_p, top_k)
    assert set(tokens) <= {i for i, p in enumerate(probs) if p}
    assert_follows(tokens, probs)


def test_rows_with_and_without_top_k_share_a_step():
    num_draws = 2000
    tokens, _ = choose(
        torch.tensor(LOGITS).repeat(num_draws * 3, 1),
        temperature=[1.0] * num_draws * 3,
        top_k=[None, 2, 3] * num_draws,
        top_p=[1.0] * num_draws * 3,
        seed=[0, 1, 2] * num_draws,
        step=[i // 3 for i in range(num_draws * 3)],
    )
    for i, top_k in enumerate((None, 2, 3)):
        assert tokens.tolist()[i::3] == draw(LOGITS, 1.0, num_draws=num_draws, seed=i, top_k=top_k)[0]


def test_each_row_has_settings_of_its_own():
    num_draws, settings = 2000, [(0.0, 1.0), (1.0, 1.0), (0.5, 0.7), (2.0, 1.0)]
    rows = [(t, p, seed) for _ in range(num_draws) for seed, (t, p) in enumerate(settings)]
    tokens, _ = choose(
        torch.tensor(LOGITS).repeat(len(rows), 1),
        temperature=[t for t, _, _ in rows],
        top_k=[None] * len(rows),
        top_p=[p for _, p, _ in rows],
        seed=[seed for _, _, seed in rows],
        step=[i // len(settings) for i in range(len(rows))],
    )
    drawn = tokens.tolist()
    assert set(drawn[:: len(settings)]) == {0}
    for i, (temperature, top_p) in enumerate(settings[1:], start=1):
        own = drawn[i :: len(settings)]
        assert_follows(own, probabilities(LOGITS, temperature, top_p))
        assert own == draw(LOGITS, temperature, top_p, num_draws, seed=i)[0]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.0, 0.5)])
def test_a_token_that_cannot_be_is_never_drawn(temperature, top_p):
    """Also at both ends of the vocabulary, where a uniform number near 0 or 1 would land."""
    logits = [-math.inf, 1.0, -math.inf, 1.0, 0.5, -math.inf, -math.inf]
    tokens, logprobs = draw(logits, temperature, top_p)
    assert set(tokens) <= {1, 3, 4}
    assert all(math.isfinite(x) for x in logprobs)


def test_one_possible_token_is_always_drawn():
    tokens, logprobs = draw([-math.inf, -math.inf, 0.0], 1.0, 0.9, num_draws=500)
    assert set(tokens) == {2}
    assert logprobs == [0.0] * 500


def test_a_large_vocabulary_in_16_bits():
    """The cumulative sum of many small probabilities still ends at the last token."""
    logits = torch.zeros(300, 50_000, dtype=torch.bfloat16)
    ones = [1.0] * 300
    tokens, logprobs = choose(
        logits, temperature=ones, top_k=[None] * 300, top_p=ones, seed=[5] * 300, step=list(range(300))
    )
    assert logprobs.tolist() == pytest.approx([-math.log(50_000)] * 300, abs=1e-3)
    assert abs(tokens.float().mean().item() / 50_000 - 0.5) < 4 / math.sqrt(12 * 300)
    assert tokens.max() < 50_000


@pytest.mark.parametrize("size", [255, 256, 257, 700])
def test_a_token_is_where_the_cumulative_distribution_passes_the_uniform_number(size):
    """Within blocks and across their ends: the very token that a sum in float64 gives, unless rounding may decide."""
    num_draws = 3000
    logits = 2 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    tokens, _ = draw(logits.tolist(), 1.0, num_draws=num_draws)
    uniform = torch.tensor([uniform_number(1, step) for step in range(num_draws)], dtype=torch.float64)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    is_plain = (cumulative[None] - uniform[:, None]).abs().amin(dim=-1) > 1e-6
    assert is_plain.sum() > 0.9 * num_draws
    assert torch.tensor(tokens)[is_plain].tolist() == torch.searchsorted(cumulative, uniform)[is_plain].tolist()


def test_nan_logits_give_a_token_within_the_vocabulary_and_no_log_probability():
    """On a GPU a token beyond it would end the process; the engine looks at the log-probabilities."""
    for temperature, top_p in [(0.0, 1.0), (1.0, 1.0), (1.0, 0.5)]:
        tokens, logprobs = draw([0.0, math.nan, 1.0], temperature, top_p, num_draws=3)
        assert all(0 <= token < 3 for token in tokens)
        assert all(map(math.isnan, logprobs))


def test_nan_logits_beside_others_and_greedy_rows():
    logits = torch.randn(4, 50)
    expected, _ = choose(logits, **settings([0.0, 1.0, 0.0, 1.0]))
    logits[1, 7] = logits[2, 3] = math.nan
    tokens, logprobs = choose(logits, **settings([0.0, 1.0, 0.0, 1.0]))
    assert logprobs.isnan().tolist() == [False, True, True, False]
    assert tokens[[0, 3]].equal(expected[[0, 3]])


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 0.7])
def test_logits_are_left_as_they_were(temperature):
    """In float32 there is no copy of them. A temperature that is 0 in float32 is greedy."""
    logits = torch.randn(3, 50)
    before = logits.clone()
    tokens, _ = choose(logits, **settings([temperature] * 3))
    assert logits.equal(before)
    assert tokens.equal(logits.argmax(dim=-1)) or temperature > 0.1


def settings(temperature):
    num = len(temperature)
    return {
        "temperature": temperature, "top_k": [None] * num, "top_p": [1.0] * num, "seed": list(range(num)),
        "step": [0] * num,
    }  # fmt: skip


def test_uniform_numbers_lie_between_zero_and_one_in_float32_too():
    numbers = torch.tensor([uniform_number(seed, step) for seed in range(200) for step in range(200)])
    assert numbers.dtype == torch.float32
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1


def test_uniform_numbers_are_a_function_of_their_arguments():
    """Written down, so that a run resumed by a later version draws what this one would."""
    assert [uniform_number(*x) for x in ((0, 0), (1, 0), (0, 1), (2**40 + 7, 299))] == [
        0.5079606175422668,
        0.1760125756263733,
        0.4224192500114441,
        0.251179039478302,
    ]
    assert len({uniform_number(seed, step) for seed in range(30) for step in range(30)}) > 890


@pytest.mark.parametrize("along", ["steps", "seeds", "samples"])
def test_uniform_numbers_are_equally_distributed_and_independent_of_their_neighbours(along):
    """Chi-square of single numbers and of consecutive pairs, along the three ways that a run counts."""
    of = {
        "steps": lambda i: uniform_number(12345, i),
        "seeds": lambda i: uniform_number(i, 0),
        "samples": lambda i: uniform_number(77 + (i << 32), 0),
    }[along]
    num_draws, cells = 20_000, 8
    drawn = [int(of(i) * cells) for i in range(num_draws)]
    singles = [drawn.count(cell) for cell in range(cells)]
    pairs = [0] * cells**2
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        pairs[first * cells + second] += 1
    assert sum((n - num_draws / 8) ** 2 / (num_draws / 8) for n in singles) < 24.3  # 99.9th percentile, 7 degrees
    assert sum((n - num_draws / 128) ** 2 / (num_draws / 128) for n in pairs) < 103.4  # 63 degrees
