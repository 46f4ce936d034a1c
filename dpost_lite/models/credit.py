"""Credit assignment: which tokens of an answer DPO made less likely (SCDPO, Lu et al. 2024).

The reward of a token is β (log π(token) - log π_ref(token)), where π is the policy after DPO and π_ref the SFT policy
that it started from. The sum over an answer is DPO's implicit reward, up to a constant of the question (Rafailov et al.
2023, equation 5); that single tokens carry a reward is shown in "From r to Q*" (Rafailov et al. 2024). The paper shows
it as a shade behind the tokens of a wrong solution.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpost_lite.models.adapters import reference
from dpost_lite.problems.answers import stated_answer
from dpost_lite.problems.pairs import num_steps
from dpost_lite.problems.prompts import Prompter
from dpost_lite.problems.records import PreferencePair, RewardedRationale, write_jsonl

Answers = Sequence[tuple[Sequence[int], Sequence[int]]]
"""(prompt ids, answer ids) of each; no prompt is empty."""

NUM_SHOWN = 3  # rationales of a DPO stage whose rewards are kept
DECIMALS = 6


def token_logprobs(
    policy: Any, answers: Answers, *, max_rows: int = 8, progress: Callable[[int], None] = lambda _: None
) -> list[list[float]]:
    """Return log π(token | prompt and earlier tokens) of each answer's tokens, in nats: a list per answer.

    Log-softmax in float32, no gradients; at most `max_rows` answers at a time, `(rows, tokens)` padded on the right,
    those of similar length together; `progress` gets the number of answers done. The output layer computes in float32
    too, but not where it is in oneDNN's layout (merged bfloat16 weights on a CPU). Leaves the policy in evaluation
    mode.
    """
    import torch

    policy.eval()
    logits_of = _encoder_decoder_logits if policy.config.is_encoder_decoder else _decoder_logits
    found: list[list[float]] = [[] for _ in answers]
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i][0]) - len(answers[i][1]))  # reuses freed blocks
    for start in range(0, len(order), max_rows):
        batch = order[start : start + max_rows]
        with torch.no_grad(), _float32_logits(policy):
            logits = logits_of(policy, [answers[i] for i in batch])
        for i, row_logits in zip(batch, logits, strict=True):
            logprobs = row_logits.float().log_softmax(-1)
            targets = torch.tensor(answers[i][1], device=logprobs.device)
            found[i] = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()
        progress(start + len(batch))
    return found


def _decoder_logits(policy: Any, answers: Answers) -> list[Any]:
    """Return the logits of each answer's tokens, (tokens, vocab), where the answer continues the prompt."""
    import torch

    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in answers]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    skipped = min(len(prompt) for prompt, _ in answers) - 1  # positions whose logits no row needs
    logits = policy(
        input_ids=ids.to(policy.device),
        attention_mask=seen.to(policy.device),
        use_cache=False,
        logits_to_keep=ids.shape[1] - skipped,
    ).logits
    return [
        row[len(prompt) - 1 - skipped : len(prompt) + len(answer) - 1 - skipped]
        for row, (prompt, answer) in zip(logits, answers, strict=True)
    ]


def _encoder_decoder_logits(policy: Any, answers: Answers) -> list[Any]:
    """Return the logits of each answer's tokens, (tokens, vocab), where the encoder reads the prompt."""
    from dpost_lite.models.seq2seq_trainers import batch_of

    batch = batch_of([(prompt, answer, answer) for prompt, answer in answers], policy.config)
    inputs = {name: values.to(policy.device) for name, values in batch.items() if name != "labels"}
    logits = policy(**inputs, use_cache=False).logits
    return [row[: len(answer)] for row, (_, answer) in zip(logits, answers, strict=True)]


def token_rewards(
    policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], beta: float
) -> list[list[float]]:
    """Return β (log π - log π_ref) of each token, from the two policies' `token_logprobs` of the same answers."""
    return [
        [beta * (after - before) for after, before in zip(*both, strict=True)]
        for both in zip(policy, reference, strict=True)
    ]


def adapter_rewards(model: Any, answers: Answers, beta: float, *, max_rows: int = 8) -> list[list[float]] | None:
    """Return the token rewards of the adapter "default" against DPO's frozen copy "ref"; None if there is no copy."""
    if "ref" not in getattr(model, "peft_config", {}):
        return None
    of_policy = token_logprobs(model, answers, max_rows=max_rows)
    with reference(model):
        of_reference = token_logprobs(model, answers, max_rows=max_rows)
    return token_rewards(of_policy, of_reference, beta)


def save_rewards(
    model: Any, prompter: Prompter, pairs: Sequence[PreferencePair], file: Path, *, beta: float, max_rows: int
) -> str | None:
    """Write the token rewards of a few rejected rationales of `pairs` to `file`, for the report.

    Writes nothing if there is no reference to compare with. Returns the reason if it failed, with more in the log: a
    reporting failure must not abort a run.
    """
    try:
        shown = choose_shown(pairs)
        answers = [(prompter.prompt_ids(pair.question), (*pair.prefix_ids, *pair.rejected_ids)) for pair in shown]
        rewards = adapter_rewards(model, answers, beta, max_rows=max_rows)
        if rewards is not None:
            text_of = prompter.token_text()
            write_jsonl(file, [_record(*both, text_of) for both in zip(shown, rewards, strict=True)])
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def choose_shown(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return a few pairs of different problems: whole rationales before rests, those of several steps first."""
    first: dict[str, PreferencePair] = {}
    for pair in sorted(pairs, key=lambda pair: (bool(pair.prefix_ids), num_steps(pair.rejected) < 2)):
        first.setdefault(pair.problem_id, pair)
    return list(first.values())[:NUM_SHOWN]


def _record(pair: PreferencePair, rewards: Sequence[float], text_of: Callable[[int], str]) -> RewardedRationale:
    return RewardedRationale(
        problem_id=pair.problem_id,
        question=pair.question,
        answer=stated_answer(pair.prefix + pair.chosen) or "",
        kept=pair.prefix,
        tokens=tuple(map(text_of, pair.rejected_ids)),
        rewards=tuple(round(reward, DECIMALS) for reward in rewards[len(pair.prefix_ids) :]),
    )


@contextmanager
def _float32_logits(model: Any) -> Iterator[None]:
    """Have the output layer compute in float32.

    Near 20, two bfloat16 logits are 0.125 apart: as much as DPO changes the log-probability of a token.
    """
    import torch

    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        yield
        return

    def in_float32(head: Any, inputs: Any, _: Any) -> Any:
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(inputs[0].float(), head.weight.float(), bias)

    hook = head.register_forward_hook(in_float32)
    try:
        yield
    finally:
        hook.remove()
