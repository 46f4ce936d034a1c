"""SFT and DPO of a tiny T5: what it trains on, its losses held to trl's, and the loop around them."""

import math

import pytest
import torch
from seq2seq import (
    answer_logprob,
    dpo_trainer,
    labelled,
    make_policy,
    pairs,
    run_dpo,
    run_sft,
    save_as_flan,
    tiny_t5,
)
from tiny_t5 import t5_tokenizer
from tiny_training import LN2, LORA, lora_weights, make_trainer, same, saved, saved_weights, trainers_of, whole

from dpost_lite.errors import DataError, RecipeError
from dpost_lite.models import adapters, credit, dpo, loading, sft
from dpost_lite.models.family import ENCODER_DECODER, LEFT_OUT, labels_of
from dpost_lite.models.seq2seq_trainers import dpo_loss, label_logprobs
from dpost_lite.problems.prompts import EncoderDecoderPrompter, Prompter
from dpost_lite.problems.records import RewardedRationale, read_jsonl
from dpost_lite.recipe import SftRecipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_as_flan(tiny_t5(), tmp_path_factory.mktemp("flan"))


@pytest.fixture(scope="module")
def prompter():
    return EncoderDecoderPrompter(t5_tokenizer())


@pytest.fixture(scope="module")
def policy_dir(base, tmp_path_factory):
    return make_policy(base, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def full_dir(base, prompter, tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    run_sft(base, prompter, path, precision="full", learning_rate=1e-3)
    return path


@pytest.fixture(scope="module")
def decoder_prompter(base_dir):
    return Prompter(loading.load_tokenizer(base_dir))


@pytest.fixture(scope="module")
def decoder_policy(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder")
    adapters.save(adapters.create(loading.load(base_dir, "16bit", compute="float32"), LORA, seed=1), None, path)
    return path


def first_tokens(token_ids):
    """An `Inserted` that finds the second and the fifth token."""
    return [i in (1, 4) for i in range(len(token_ids))]


def sft_trainer(base, prompter, out, items, *, precision="full", inserted=None, **settings):
    """The trainer of `train_sft`, before a step."""
    recipe = SftRecipe(**{"batch_size": 4, "micro_batch_size": 4, **settings})
    policy = adapters.load_for_sft(base, whole(sft=recipe, precision=precision), "plain")
    rows = []
    for item in items:
        labels = labels_of(item.token_ids, inserted)
        rows.append(ENCODER_DECODER.sft_row(prompter.prompt_ids(item.question), item.token_ids, labels))
    return sft.make_trainer(policy, prompter, rows, out, recipe, 42)


# SFT


def test_sft_learns_and_saves_an_adapter(base, prompter, tmp_path):
    figures = run_sft(base, prompter, tmp_path, num=8, epochs=4, learning_rate=1e-2, warmup_ratio=0)
    assert figures["steps"] == 8
    assert figures["last_loss"] < 0.9 * figures["first_loss"]
    assert adapters.is_adapter(tmp_path)
    assert not any("lm_head" in name for name in saved(tmp_path))


def test_the_loss_is_over_the_answer_and_its_stop_token(base, prompter, tmp_path):
    items = labelled(prompter, 4)
    trainer = sft_trainer(base, prompter, tmp_path, items)
    assert all(item.token_ids[-1] == prompter.stop_id for item in items)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.eval()
    found = trainer.compute_loss(trainer.model, batch).item()
    total = sum(answer_logprob(trainer.model, prompter.prompt_ids(item.question), item.token_ids) for item in items)
    assert found == pytest.approx(-total / sum(len(item.token_ids) for item in items), rel=1e-5)


def test_tokens_left_out_of_the_loss_stay_in_the_decoders_input(base, prompter, tmp_path):
    (item,) = labelled(prompter, 1)
    trainer = sft_trainer(base, prompter, tmp_path, [item], inserted=first_tokens)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["decoder_input_ids"][0].tolist() == [0, *item.token_ids[:-1]]
    kept = [i for i in range(len(item.token_ids)) if i not in (1, 4)]
    assert batch["labels"][0].ne(LEFT_OUT).nonzero().flatten().tolist() == kept
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([prompter.prompt_ids(item.question)]),
            decoder_input_ids=torch.tensor([[0, *item.token_ids[:-1]]]),
        ).logits[0]
    by_hand = -logits.log_softmax(-1)[kept, torch.tensor(item.token_ids)[kept]].mean().item()
    assert trainer.compute_loss(model, batch).item() == pytest.approx(by_hand, rel=1e-5)


def without_dropout(monkeypatch):
    """Have `train_sft` load bases that drop nothing out, so that its losses can be compared."""
    real = adapters.load

    def load(*args, **kwargs):
        from dpost_lite.models.seq2seq_trainers import switch_off_dropout

        model = real(*args, **kwargs)
        switch_off_dropout(model)
        return model

    monkeypatch.setattr(adapters, "load", load)


def test_micro_batches_weigh_by_their_tokens(base, prompter, tmp_path, monkeypatch):
    """A step's gradient is that of its tokens' mean, however it is cut: the same losses and weights."""
    without_dropout(monkeypatch)
    found = {}
    for micro in (4, 1):
        losses: list[float] = []
        run_sft(
            base, prompter, tmp_path / str(micro), precision="full", micro_batch_size=micro, learning_rate=1e-3,
            warmup_ratio=0, progress=lambda *_, loss, losses=losses: losses.append(loss),
        )  # fmt: skip
        found[micro] = losses
    assert found[1] == pytest.approx(found[4], rel=1e-5)
    assert found[4][1] < found[4][0]
    whole_batch, single = (saved_weights(tmp_path / str(micro)) for micro in (4, 1))
    for name, values in whole_batch.items():
        torch.testing.assert_close(single[name], values, rtol=0, atol=2e-4)  # Adam's first steps are signs


def test_sft_drops_out_what_the_config_says_and_dpo_nothing(base, prompter, policy_dir, tmp_path):
    items = labelled(prompter, 4)
    trainer = sft_trainer(base, prompter, tmp_path, items, precision="4bit")
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    assert len({trainer.compute_loss(trainer.model, batch).item() for _ in range(3)}) == 3
    trainer = dpo_trainer(base, prompter, policy_dir, tmp_path, pairs(prompter))
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(LN2, abs=1e-6)
    of_policy = set(trainer._metrics["train"]["logps/chosen"])
    trainer.compute_loss(trainer.model, batch)
    assert set(trainer._metrics["train"]["logps/chosen"]) == of_policy
    assert trainer.model.config.dropout_rate == 0.1  # so that it is saved as it was


def test_rows_of_similar_length_come_together(base, prompter, tmp_path):
    items = labelled(prompter, 8)
    trainer = sft_trainer(base, prompter, tmp_path, items, batch_size=2, micro_batch_size=2)
    expected = [len(prompter.prompt_ids(item.question)) + len(item.token_ids) for item in items]
    assert list(trainer._get_train_sampler(trainer.train_dataset).lengths) == expected


def test_the_length_limit_holds_for_each_side(base, prompter, tmp_path):
    items = labelled(prompter, 8)
    sides = [(len(prompter.prompt_ids(item.question)), len(item.token_ids)) for item in items]
    longest = max(map(max, sides))
    assert max(map(sum, sides)) > longest
    assert run_sft(base, prompter, tmp_path / "all", max_length=longest)["num_too_long"] == 0
    figures = run_sft(base, prompter, tmp_path / "most", max_length=longest - 1)
    assert figures["num_too_long"] == sum(max(side) == longest for side in sides) > 0
    with pytest.raises(DataError, match=r"sft\.max_length=16 leaves none"):
        run_sft(base, prompter, tmp_path / "none", max_length=16)


@pytest.mark.parametrize("precision", ["4bit", "full"])
def test_sft_goes_on_after_a_stop_as_if_there_had_been_none(base, prompter, tmp_path, precision):
    """Dropout included: the random states come back too."""
    settings = dict(precision=precision, epochs=2, learning_rate=1e-3, micro_batch_size=2)
    run_sft(base, prompter, tmp_path / "whole", **settings)

    def stop(done, *_, **__):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sft(base, prompter, tmp_path / "parts", progress=stop, **settings)
    assert run_sft(base, prompter, tmp_path / "parts", **settings)["steps"] == 4
    weights = saved if precision == "4bit" else saved_weights
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


# DPO


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["4bit", "16bit", "full"])
def test_dpo_starts_at_ln_2_with_rewards_of_0(base, prompter, policy_dir, full_dir, tmp_path, precision, compute):
    start = full_dir if precision == "full" else policy_dir
    given = pairs(prompter, 6)
    trainer = dpo_trainer(base, prompter, start, tmp_path, given, precision=precision, compute=compute)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    assert loss.item() == pytest.approx(LN2, abs=1e-6 if precision != "full" else 1e-5)
    metrics = trainer._metrics["train"]
    tolerance = 0 if precision != "full" else 1e-4  # computed with other padding
    assert metrics["rewards/chosen"] + metrics["rewards/rejected"] == pytest.approx([0, 0], abs=tolerance)


def test_loss_rewards_and_gradients_are_those_of_trl(base_dir, decoder_prompter, decoder_policy, tmp_path):
    """On a decoder, where both can be computed: its logits at an answer's tokens are what T5's decoder gives."""
    trainer = make_trainer(
        base_dir, decoder_prompter, decoder_policy, tmp_path, precision="16bit", nll_weight=0.5, beta=0.3
    )
    model = trainer.model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))  # or policy and reference were the same
    batch = trainer.data_collator(list(trainer.train_dataset))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    of_trl = trainer.compute_loss(model, batch)
    expected = torch.autograd.grad(of_trl, list(trained.values()))

    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, LEFT_OUT)[:, 1:]

    def logprobs():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return label_logprobs(logits[:, :-1], labels)

    with torch.no_grad(), adapters.reference(model):
        of_reference = logprobs().sum(-1)
    per_token = logprobs()
    loss, figures = dpo_loss(per_token.sum(-1), of_reference, 0.3)
    chosen, _ = per_token.chunk(2)
    loss = loss - 0.5 * chosen.sum() / labels.chunk(2)[0].ne(LEFT_OUT).sum()
    assert loss.item() == pytest.approx(of_trl.item(), rel=1e-5)
    assert abs(figures["rewards/margins"].mean().item()) > 0.01
    for name, values in figures.items():
        assert values.mean().item() == pytest.approx(trainer._metrics["train"][name][0], rel=1e-4, abs=1e-5), name
    for name, mine, theirs in zip(trained, torch.autograd.grad(loss, list(trained.values())), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_the_trainers_loss_is_that_of_the_formula(base, prompter, policy_dir, tmp_path):
    """With log-probabilities of single answers, without padding; after a change of the policy."""
    given = pairs(prompter, 3, prefix=4)
    trainer = dpo_trainer(base, prompter, policy_dir, tmp_path, given, beta=0.2, nll_weight=0.5)
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if ".default." in name:
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    found = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))).item()

    def logps(model):
        return [
            [answer_logprob(model, prompter.prompt_ids(p.question), (*p.prefix_ids, *own), len(p.prefix_ids))
             for own in (p.chosen_ids, p.rejected_ids)]
            for p in given
        ]  # fmt: skip

    of_policy = logps(trainer.model)
    of_reference = logps(adapters.attach(loading.load(base, compute="float32"), policy_dir, trainable=False))
    margins = [0.2 * ((a - c) - (b - d)) for (a, b), (c, d) in zip(of_policy, of_reference, strict=True)]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    nll = -sum(chosen for chosen, _ in of_policy) / sum(len(p.chosen_ids) for p in given)
    assert max(map(abs, margins)) > 0.01
    assert found == pytest.approx(expected + 0.5 * nll, rel=1e-4)


@pytest.mark.parametrize("precision", ["4bit", "full"])
def test_dpo_learns_to_prefer(base, prompter, policy_dir, full_dir, tmp_path, precision):
    steps = []
    figures = run_dpo(
        base, prompter, full_dir if precision == "full" else policy_dir, tmp_path, num=16, learning_rate=2e-3,
        precision=precision, micro_batch_size=2, progress=lambda *_, **found: steps.append(found),
    )  # fmt: skip
    assert figures["steps"] == len(steps) == 4
    assert figures["first_loss"] == pytest.approx(LN2, abs=1e-5)
    assert figures["last_margin"] == steps[-1]["margin"] > 0
    assert figures["last_accuracy"] == steps[-1]["accuracy"] == 1
    assert steps[0]["chosen_change"] == pytest.approx(0, abs=1e-3)
    changed = steps[-1]["chosen_change"] - steps[-1]["rejected_change"]
    assert steps[-1]["margin"] == pytest.approx(0.1 * changed, rel=1e-3)


def test_the_reference_stays_the_policy_that_dpo_began_with(base, prompter, policy_dir, tmp_path, monkeypatch):
    trainers = trainers_of(dpo, monkeypatch)
    run_dpo(base, prompter, policy_dir, tmp_path, learning_rate=1e-3, warmup_ratio=0)
    model = trainers[0].model
    before = lora_weights(adapters.attach(loading.load(base, compute="float32"), policy_dir, trainable=False))
    assert same(lora_weights(model, "ref"), before)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ref." in n)
    assert not same(lora_weights(model), before)
    assert saved(tmp_path).keys() == saved(policy_dir).keys()


def test_kept_steps_and_inserted_tokens_are_read_and_not_compared(base, prompter, policy_dir, tmp_path):
    (pair,) = pairs(prompter, 1, prefix=5)
    trainer = dpo_trainer(base, prompter, policy_dir, tmp_path, [pair], inserted=first_tokens)
    batch = trainer.data_collator(list(trainer.train_dataset))
    for side, own in enumerate((pair.chosen_ids, pair.rejected_ids)):
        answer = (*pair.prefix_ids, *own)
        assert batch["decoder_input_ids"][side, : len(answer)].tolist() == [0, *answer[:-1]]
        compared = batch["labels"][side].ne(LEFT_OUT).nonzero().flatten().tolist()
        assert compared == [5 + i for i in range(len(own)) if i not in (1, 4)]
        assert batch["labels"][side][compared].tolist() == [own[i - 5] for i in compared]
        assert tuple(batch["input_ids"][side].tolist()) == prompter.prompt_ids(pair.question)


def test_micro_batches_weigh_the_same(base, prompter, policy_dir, tmp_path):
    """As in trl: a step's loss is the mean of its micro-batches'; of equal size, they give what the whole gives."""
    found = {}
    for micro in (4, 2, 1):
        losses = []
        run_dpo(
            base, prompter, policy_dir, tmp_path / str(micro), num=8, micro_batch_size=micro, learning_rate=1e-3,
            warmup_ratio=0, progress=lambda *_, loss, losses=losses, **__: losses.append(loss),
        )  # fmt: skip
        found[micro] = losses
    assert found[1] == pytest.approx(found[4], rel=1e-4)
    assert found[2] == pytest.approx(found[4], rel=1e-4)
    assert found[4][1] < LN2 - 1e-3


@pytest.mark.parametrize("precision", ["4bit", "full"])
def test_dpo_goes_on_after_a_stop_as_if_there_had_been_none(base, prompter, policy_dir, full_dir, tmp_path, precision):
    """Its reference is the policy before the first step, not the one of the checkpoint."""
    start = full_dir if precision == "full" else policy_dir
    settings = dict(num=8, precision=precision, batch_size=2, micro_batch_size=2, learning_rate=1e-3, max_logp_drop=1e6)
    run_dpo(base, prompter, start, tmp_path / "whole", **settings)

    def stop(done, *_, **__):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_dpo(base, prompter, start, tmp_path / "parts", progress=stop, **settings)
    assert run_dpo(base, prompter, start, tmp_path / "parts", **settings)["steps"] == 4
    weights = saved if precision == "4bit" else saved_weights
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_training_ends_when_rationales_have_lost_too_much(base, prompter, policy_dir, tmp_path):
    figures = run_dpo(
        base, prompter, policy_dir, tmp_path, num=8, batch_size=1, micro_batch_size=1, learning_rate=1e-2,
        warmup_ratio=0, max_logp_drop=1e-6,
    )  # fmt: skip
    assert (figures["steps"], figures["ended_early"]) == (2, True)
    before = lora_weights(adapters.attach(loading.load(base), policy_dir, trainable=False))
    assert same(lora_weights(adapters.attach(loading.load(base), tmp_path, trainable=False)), before)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_recomputed_activations_give_the_same_gradients(base, prompter, policy_dir, tmp_path, monkeypatch, stage):
    without_dropout(monkeypatch)
    found = {}
    for recomputes in (False, True):
        if stage == "sft":
            trainer = sft_trainer(base, prompter, tmp_path, labelled(prompter, 4), precision="4bit")
        else:
            trainer = dpo_trainer(base, prompter, policy_dir, tmp_path, pairs(prompter))
        model = trainer.model.train()
        calls = []
        model.get_decoder().block[0].layer[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if recomputes:
            model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.compute_loss(model, trainer.data_collator(list(trainer.train_dataset))).backward()
        found[recomputes] = (len(calls), {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    (plain_calls, plain), (calls, recomputed) = found[False], found[True]
    assert calls > plain_calls
    assert all(gradient is not None and gradient.isfinite().all() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_other_losses_are_refused_for_t5(base, prompter, policy_dir, tmp_path):
    dpo.check_loss("sigmoid", ENCODER_DECODER)
    with pytest.raises(RecipeError, match=r"dpo\.loss: ipo is for decoder-only models; for T5 use sigmoid"):
        dpo.check_loss("ipo", ENCODER_DECODER)
    with pytest.raises(RecipeError, match=r"no loss 'sigmiod' \(did you mean"):
        dpo.check_loss("sigmiod", ENCODER_DECODER)
    with pytest.raises(RecipeError, match="for T5 use sigmoid"):
        run_dpo(base, prompter, policy_dir, tmp_path, loss="ipo")


def test_pairs_of_similar_length_come_together(base, prompter, policy_dir, tmp_path):
    given = pairs(prompter, 8, prefix=3)
    trainer = dpo_trainer(base, prompter, policy_dir, tmp_path, given, batch_size=8, micro_batch_size=2)
    lengths = [len(prompter.prompt_ids(p.question)) + 3 + max(len(p.chosen_ids), len(p.rejected_ids)) for p in given]
    drawn = [lengths[i] for i in trainer.get_train_dataloader().batch_sampler.sampler]
    assert drawn == sorted(lengths, reverse=True) != lengths


# Token rewards


def test_token_rewards_add_up_to_the_log_probabilities(base, prompter, policy_dir):
    policy = adapters.attach(loading.load(base, compute="float32"), policy_dir, trainable=False)
    answers = [(prompter.prompt_ids(p.question), p.chosen_ids) for p in pairs(prompter, 5)]
    by_hand = [pytest.approx(answer_logprob(policy, *both), rel=1e-4) for both in answers]
    for max_rows in (1, 3):
        found = credit.token_logprobs(policy, answers, max_rows=max_rows)
        assert [len(row) for row in found] == [len(answer) for _, answer in answers]
        assert [sum(row) for row in found] == by_hand


def test_dpo_keeps_token_rewards_for_the_report(base, prompter, policy_dir, tmp_path):
    figures = run_dpo(base, prompter, policy_dir, tmp_path, num=4, prefix=3, learning_rate=1e-3, warmup_ratio=0)
    assert "rewards_failed" not in figures
    given = {pair.problem_id: pair for pair in pairs(prompter, 4, prefix=3)}
    found = list(read_jsonl(tmp_path / "rewards.jsonl", RewardedRationale))
    assert len(found) == credit.NUM_SHOWN
    before, after = (
        adapters.attach(loading.load(base, compute="float32"), folder, trainable=False)
        for folder in (policy_dir, tmp_path)
    )
    for one in found:
        pair = given[one.problem_id]
        assert len(one.rewards) == len(one.tokens) == len(pair.rejected_ids)
        prompt, answer = prompter.prompt_ids(pair.question), (*pair.prefix_ids, *pair.rejected_ids)
        change = answer_logprob(after, prompt, answer, 3) - answer_logprob(before, prompt, answer, 3)
        assert sum(one.rewards) == pytest.approx(0.1 * change, abs=1e-4)
        assert abs(change) > 1e-3
