"""What the tests of the engine share: requests, references, and a model that tells stories with annotations."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from conftest import tiny_model  # noqa: E402

from dpost_lite.problems.calculator import Calculator  # noqa: E402
from dpost_lite.problems.forcing import Forcer, Writer  # noqa: E402
from dpost_lite.sampling.engine import Engine  # noqa: E402
from dpost_lite.sampling.request import Completion, Request  # noqa: E402

STOP = 2


def prompts(num_prompts: int, vocabulary: int = 64, longest: int = 23, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of mixed lengths, the first a single token."""
    dice = random.Random(seed)
    lengths = [1, *(dice.randint(2, longest) for _ in range(num_prompts - 1))]
    return [tuple(dice.randrange(3, vocabulary) for _ in range(length)) for length in lengths]


def ask(prompt: Iterable[int], key: Any = None, **settings: Any) -> Request:
    prompt = tuple(prompt)
    settings.setdefault("stop_ids", frozenset({STOP}))
    return Request(key=prompt if key is None else key, prompt_ids=prompt, **settings)


def run(
    model: Any, requests: Iterable[Request], num_rows: int = 4, writer: Writer | None = None
) -> dict[Any, Completion]:
    """All samples by (key, sample number), each of which must come exactly once."""
    requests = list(requests)
    samples = list(Engine(model, writer=writer, max_rows=num_rows).run(requests))
    found = {(sample.key, sample.index): sample for sample in samples}
    assert len(found) == len(samples)
    assert found.keys() == {(request.key, i) for request in requests for i in range(request.num_samples)}
    return found


def generated(model: Any, prompt: tuple[int, ...], max_new_tokens: int, stops: Iterable[int] = (STOP,)) -> list[int]:
    """What transformers' own greedy `generate` writes behind a prompt."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    return output[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()


@torch.inference_mode()
def next_logprobs(model: Any, prompt: Iterable[int], answer: list[int]) -> Any:
    """log π at temperature 1 of what may follow each start of an answer, `(answer + 1, vocabulary)`, by one forward."""
    prompt = list(prompt)
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        inputs = {"input_ids": prompt, "decoder_input_ids": [start, *answer]}
    else:
        inputs = {"input_ids": prompt + answer}
    logits = model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0]
    return logits[-len(answer) - 1 :].float().log_softmax(-1)


def plain_logprobs(model: Any, prompt: Iterable[int], answer: list[int]) -> list[float]:
    """log π of each answer token at temperature 1, by one forward over the finished sequence."""
    logprobs = next_logprobs(model, prompt, answer)
    return [logprobs[i, token].item() for i, token in enumerate(answer)]


def same(first: dict[Any, Completion], second: dict[Any, Completion]) -> None:
    """Assert that two runs drew the same samples."""
    assert first.keys() == second.keys()
    for key, a in first.items():
        b = second[key]
        assert (a.token_ids, a.forced, a.end) == (b.token_ids, b.forced, b.end), key
        assert (a.num_calculated, a.num_refused) == (b.num_calculated, b.num_refused), key
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4), key


@contextmanager
def watched(model: Any, before_forward: Any) -> Iterator[None]:
    """Call `before_forward(Forward)` before each forward of the model; it may raise."""
    hook = model.register_forward_pre_hook(lambda _, args, inputs: before_forward(Forward(inputs)), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Forward:
    """What the model sees of one forward: `prompt_lengths` of a packed prefill, or the `num_rows` of a decode step."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        positions, kept = inputs["position_ids"][0].tolist(), inputs["logits_to_keep"]
        self.is_prefill = not isinstance(kept, int)  # logits are kept at the end of each prompt
        starts = [i for i, position in enumerate(positions) if self.is_prefill and position == 0]
        self.prompt_lengths = tuple(b - a for a, b in pairwise([*starts, len(positions)]))
        self.num_rows = 0 if self.is_prefill else kept


SPECIAL = ["<pad>", "<s>", "</s>"]
STORIES = {  # first word, which ends the prompt -> the words that follow it; each word always has the same successor
    "plain": ["plain", " one", " two", " three", " four", "</s>"],
    "sum": ["sum", " has", " <<", "48", "/2", "=", "99", " wrong"],  # `=` -> 24>>24
    "kept digit": ["kept digit", "=<<", "3", "*5", "=1"],  # a merge with the right first digit
    "changed digit": ["changed digit", "c<<", "7", "*8", "=1"],  # a merge with a wrong one: the token is replaced
    "long": ["long", "l<<", "12345678", "*1001", "="],  # a result of eleven tokens, and that twice
    "refused": ["refused", "r<<", "5/0", "=0", ">>", " apples"],
    "unclosed": ["unclosed", "u<<", "7+", " two"],
    "nested": ["nested", "n<<", "1+", "<<", "48"],
    "closed": ["closed", "d<<", "2+2>>", "4", " one"],
    "newline": ["newline", "w<<", "6+\n", "6", "=", "99"],
    "first": ["first", "f<<1+1=", "99"],  # one token that opens, asks, and is the answer's first
    "three": ["three", "<<<", "9", "/2", "="],
    "after": ["24", " apples", ".", " four"],
    "after two": ["15", " apples"],
    "after three": ["56", " pears", " sum", " has"],
    "after four": ["8", " five", " <<"],
    "after five": ["2", " apples"],
    "after six": ["5", " five"],
    "after seven": [" wrong", "</s>"],
}
WORDS = [
    *SPECIAL,
    *dict.fromkeys(["\n", *"0123456789.-", *(w for s in STORIES.values() for w in s if w not in SPECIAL)]),
]
ID = {word: i for i, word in enumerate(WORDS)}
STARTS = [name for name in STORIES if not name.startswith("after")]


def encode(text: str) -> list[int]:
    """Longest match first, as a tokenizer whose merges cross everything."""
    ids = []
    while text:
        word = max((w for w in WORDS if w not in SPECIAL and text.startswith(w)), key=len, default=None)
        if word is not None:
            ids.append(ID[word])
        text = text[len(word or "?") :]
    return ids


def text_of(token_id: int) -> str:
    word = WORDS[token_id] if token_id < len(WORDS) else "?"
    return "" if word in SPECIAL else word


FORCER = Forcer(text_of, encode, Calculator())


@pytest.fixture(scope="module")
def storyteller() -> Any:
    """A Llama that tells the stories: the next word's logit is about 6 nats above all others.

    That is enough for greedy answers to keep to the story, and for sampled ones to lose the thread now and then.

    Embeddings are unit vectors, so the head's columns are the successors. The layers add a little of everything that
    was read before: log-probabilities, not the greedy words, depend on each position of the cache.
    """
    size = -(-len(WORDS) // 64) * 64
    model = tiny_model("llama", vocab_size=size, hidden_size=size, num_attention_heads=4, head_dim=16)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        head = model.lm_head.weight.copy_(torch.randn(size, size) * 0.02)
        for story in STORIES.values():
            for word, successor in pairwise(story):
                head[ID[successor], ID[word]] = 6.0 / size**0.5  # RMSNorm makes a unit vector this long
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.007
            layer.mlp.down_proj.weight *= 0.0005
    return model


def story_prompt(start: str, seed: int) -> tuple[int, ...]:
    """Random words, then the one that starts a story."""
    dice = random.Random(seed)
    return (*(dice.randrange(3, len(WORDS)) for _ in range(dice.randint(0, 12))), ID[start])


def one_row(model: Any, request: Request, writer: Writer) -> Completion:
    """The reference: one row, the whole text read again at each step, greedy."""
    sample, row = Completion(request.key, 0), writer.row()
    while len(sample.token_ids) < request.max_new_tokens:
        logprobs = next_logprobs(model, request.prompt_ids, [*request.prefix_ids, *sample.token_ids])[-1]
        token = int(logprobs.argmax())
        written = row.push(token) or [token]
        is_kept = written[0] == token
        room = request.max_new_tokens - len(sample.token_ids)
        sample.token_ids += written[:room]
        sample.forced += ([not is_kept] + [True] * (len(written) - 1))[:room]
        sample.logprobs += ([logprobs[token].item() if is_kept else 0.0] + [0.0] * (len(written) - 1))[:room]
        if token in request.stop_ids:
            sample.end = "stop"
            break
    sample.num_calculated, sample.num_refused = row.num_calculated, row.num_refused
    return sample


def told(model: Any, requests: list[Request]) -> dict[Any, Completion]:
    return {(r.key, i): one_row(model, r, FORCER) for r in requests for i in range(r.num_samples)}


def words(sample: Completion) -> str:
    return "".join(map(text_of, sample.token_ids))


class Dictation:
    """A writer for any vocabulary: every fourth token brings up to three others with it."""

    num_calculated = num_refused = 0

    def row(self) -> "Dictation":
        return Dictation()

    def poll(self) -> None:
        raise AssertionError

    def push(self, token_id: int) -> list[int] | None:
        return [token_id, *range(3, 4 + token_id % 3)] if token_id % 4 == 1 else None
