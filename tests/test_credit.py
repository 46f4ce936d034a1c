"""Token rewards on a tiny model: by hand, in batches, and as a DPO training keeps them."""

from dataclasses import replace

import pytest
import torch
from tiny_training import TOLERANCE, answer_logprob, load, make_trainer, pairs, rows, run_dpo, trainers_of

from dpost_lite.models import adapters, credit, dpo
from dpost_lite.problems.records import RewardedRationale, read_jsonl


@pytest.fixture(scope="module")
def policy(base_dir, policy_dir):
    return adapters.attach(load(base_dir), policy_dir, trainable=False)


@pytest.fixture(scope="module")
def answers(prompter):
    """Answers of different lengths, after different prompts."""
    given = rows(prompter)
    return [
        (row["prompt_ids"][i:], row[side]) for side in ("chosen_ids", "rejected_ids") for i, row in enumerate(given)
    ]


def close(values: list[list[float]]):
    return [pytest.approx(row, rel=1e-4, abs=1e-4) for row in values]


def test_tokens_add_up_to_the_answer_s_log_probability(policy, answers):
    found = credit.token_logprobs(policy, answers)
    assert [len(row) for row in found] == [len(answer) for _, answer in answers]
    by_hand = [answer_logprob(policy, prompt, answer) for prompt, answer in answers]
    assert [sum(row) for row in found] == pytest.approx(by_hand, rel=TOLERANCE["float32"])


def test_they_add_up_to_trl_s_sums(base_dir, prompter, policy_dir, policy, tmp_path):
    trainer = make_trainer(base_dir, prompter, policy_dir, tmp_path)
    given = rows(prompter)
    sides = trainer.compute_ref_log_probs(trainer.model.eval(), trainer.data_collator(given))
    for of_trl, side in zip(sides, ("chosen_ids", "rejected_ids"), strict=True):
        found = credit.token_logprobs(policy, [(row["prompt_ids"], row[side]) for row in given])
        assert [sum(row) for row in found] == pytest.approx(of_trl.tolist(), rel=TOLERANCE["float32"])


@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_batches_do_not_change_them(policy, answers, max_rows):
    alone = [credit.token_logprobs(policy, [one])[0] for one in answers]
    assert credit.token_logprobs(policy, answers, max_rows=max_rows) == close(alone)


def test_padding_on_the_left_would_give_the_same(policy, answers):
    wholes = [[*prompt, *answer] for prompt, answer in answers]
    width = max(map(len, wholes))
    ids = torch.tensor([[0] * (width - len(whole)) + whole for whole in wholes])
    seen = torch.tensor([[0] * (width - len(whole)) + [1] * len(whole) for whole in wholes])
    with torch.no_grad():
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        logprobs = policy(input_ids=ids, attention_mask=seen, position_ids=positions).logits.float().log_softmax(-1)
    on_left = [
        logprobs[i, -len(answer) - 1 : -1].gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1).tolist()
        for i, (_, answer) in enumerate(answers)
    ]
    assert credit.token_logprobs(policy, answers) == close(on_left)


def test_logits_of_a_bfloat16_model_are_float32(base_dir, policy_dir, answers):
    policy = adapters.attach(load(base_dir, "16bit", "bfloat16"), policy_dir, trainable=False)
    seen = []
    policy.register_forward_hook(lambda model, inputs, out: seen.append(out.logits.dtype))
    found = credit.token_logprobs(policy, answers[:1])[0]
    assert seen == [torch.float32]
    assert len(set(found)) > 1
    policy(input_ids=torch.tensor([[1, 2]]))
    assert seen[1] == torch.bfloat16  # as before


def test_equal_policies_have_rewards_of_0(policy, answers):
    found = credit.token_logprobs(policy, answers)
    assert {reward for row in credit.token_rewards(found, found, 0.1) for reward in row} == {0.0}
    assert credit.token_rewards([[-1.0, -2.0]], [[-2.0, -1.5]], 0.1) == [pytest.approx([0.1, -0.05])]


def test_a_dpo_training_keeps_the_rewards_of_a_few_rejected_rationales(
    base_dir, prompter, policy_dir, tmp_path, monkeypatch
):
    trainers = trainers_of(dpo, monkeypatch)
    run_dpo(base_dir, prompter, policy_dir, tmp_path, num=8, learning_rate=1e-3, batch_size=2)
    found = list(read_jsonl(tmp_path / "rewards.jsonl", RewardedRationale))
    assert len(found) == credit.NUM_SHOWN
    after = trainers[0].model
    before = adapters.attach(load(base_dir), policy_dir, trainable=False)
    given = {pair.problem_id: pair for pair in pairs(prompter, 8)}
    for one in found:
        pair = given[one.problem_id]
        assert (one.question, one.kept, "".join(one.tokens)) == (pair.question, "", pair.rejected)
        assert pair.chosen.endswith(f"#### {one.answer}")
        assert len(one.rewards) == len(one.tokens) == len(pair.rejected_ids)
        answer = list(prompter.prompt_ids(pair.question)), list(pair.rejected_ids)
        change = answer_logprob(after, *answer) - answer_logprob(before, *answer)
        assert sum(one.rewards) == pytest.approx(0.1 * change, abs=1e-3)
        assert abs(sum(one.rewards)) > 1e-2
    assert after.active_adapter == "default"


def test_without_a_reference_there_is_no_file(base_dir, prompter, full_dir, tmp_path):
    run_dpo(base_dir, prompter, full_dir, tmp_path, precision="full")
    assert not (tmp_path / "rewards.jsonl").exists()


def test_a_failure_ends_in_the_log(base_dir, prompter, policy_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(credit, "token_logprobs", lambda *_, **__: 1 / 0)
    figures = run_dpo(base_dir, prompter, policy_dir, tmp_path)
    assert figures["steps"] == 1
    assert figures["rewards_failed"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not (tmp_path / "rewards.jsonl").exists()


def test_rewards_are_shown_of_whole_rationales_of_several_steps_first(prompter):
    one, two, three, four = pairs(prompter, 4)
    rest = replace(one, prefix="A is 1.\n", prefix_ids=(5, 6), rejected="B is 2.\nC is 3.\n#### 3")
    long = replace(three, rejected="A is 1.\nB is 2.\n#### 2")
    shown = credit.choose_shown([rest, two, two, three, long, four])
    assert shown == [long, two, four]
    assert credit.choose_shown([rest, rest, two]) == [two, rest]
