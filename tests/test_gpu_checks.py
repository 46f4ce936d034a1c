"""The checks of a GPU, made on the CPU as far as it has what they check; and that each finds a fault put in."""

# ruff: noqa: F811 - a fixture is imported and then named as an argument

import math
import types
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from memory_efficient import efficient_attention  # noqa: E402
from test_precision import fast  # noqa: E402, F401  (a fixture)

from dpost_lite.models import adapters, hardware  # noqa: E402
from dpost_lite.pipeline import gpu_attention, gpu_check, gpu_checks, gpu_memory  # noqa: E402
from dpost_lite.pipeline.gpu_checks import Outcome  # noqa: E402
from dpost_lite.sampling import attention, step_inputs  # noqa: E402
from dpost_lite.sampling.forward import DecoderOnly  # noqa: E402
from dpost_lite.sampling.graphs import Graphs  # noqa: E402

NOWHERE = Path("/nowhere")  # of checks that write no files


@pytest.fixture(params=["float32", "bfloat16"])
def computing(request, monkeypatch) -> torch.dtype:
    """The compute type, each on every machine."""
    dtype = getattr(torch, request.param)
    monkeypatch.setattr(hardware, "compute_dtype", lambda *_, **__: dtype)
    return dtype


# CUDA graphs, with a stand-in that replays by running the step again


@pytest.fixture
def replaying(monkeypatch):
    """A function: (what to add to the logits, whether new inputs arrive) -> from now on graphs work on the CPU.

    It returns the shapes recorded.
    """

    def install(error: float = 0.0, *, reads_inputs: bool = True) -> list[step_inputs.StepShape]:
        recorded = []

        def record(self, packed, shape):
            recorded.append(shape)
            inputs = packed.clone()
            seen = inputs if reads_inputs else packed.clone()
            if self._logits is None:
                self._logits = torch.empty(self._max_rows, gpu_checks.SHAPE.vocabulary)

            def replay():
                self._logits[: shape.num_rows] = self._step(seen, shape)
                self._logits[: shape.num_rows, 5] += error

            return types.SimpleNamespace(replay=replay), inputs

        monkeypatch.setattr(Graphs, "_record", record)
        return recorded

    monkeypatch.setattr(hardware, "compute_dtype", lambda *_, **__: torch.float32)
    return install


def test_graphs_that_change_nothing_pass_and_forced_tokens_are_among_the_replays(replaying):
    recorded = replaying()
    found = gpu_checks.compare_replays("cpu")
    assert found.state == "ok", found
    assert int(found.text.split()[0]) > 20
    assert {bool(shape.num_extra) for shape in recorded} == {False, True}


def test_a_replay_that_returns_other_logits_is_found(replaying):
    replaying(error=1e-4)
    found = gpu_checks.compare_replays("cpu")
    assert found.state == "failed"
    assert found.text.startswith("CUDA graphs give other logits here (log-probabilities differ by ")


def test_a_replay_that_returns_nan_is_no_success(replaying):
    replaying(error=float("nan"))
    with pytest.raises(Exception, match="NaN"):  # the check's process fails, and so does the check
        gpu_checks.compare_replays("cpu")


def test_a_replay_of_old_inputs_is_found(replaying):
    replaying(reads_inputs=False)
    assert gpu_checks.compare_replays("cpu") == Outcome("failed", "CUDA graphs draw other tokens here")


def test_steps_that_cannot_be_recorded_or_never_are_do_not_pass(replaying, monkeypatch):
    monkeypatch.setattr("dpost_lite.sampling.graphs.RECORD_AT", 10**9)
    assert gpu_checks.compare_replays("cpu") == Outcome("failed", "no step became a CUDA graph here")
    monkeypatch.undo()

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "_record", refuse)
    found = gpu_checks.compare_replays("cpu")
    assert found.state == "failed"
    assert "cannot be CUDA graphs" in found.text
    assert "operation not permitted" in found.text


# Attention


def test_a_fused_kernel_that_agrees_with_products_passes(computing):
    found = gpu_attention.fused_attention("cpu", NOWHERE)
    assert found.state == "ok", found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", gpu_attention.WINDOWS)
def test_the_kernel_of_gpus_is_asked_for_what_it_can_do(dtype, window, monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient_attention)
    for head_dim, has_bias in ((128, False), (64, True)):
        off = gpu_attention.attention_difference(
            attention.memory_efficient, dtype, "cpu", head_dim, window, has_bias=has_bias
        )
        assert 1e-5 < off < 5e-3


@pytest.mark.parametrize("fault", ["base 2", "hidden", "mask", "nan"])
def test_a_wrong_fused_kernel_is_found(computing, fault, monkeypatch):
    """A log-sum-exp in base 2, weight for a part that the window hides, a mask left out, and NaN."""
    kernel_for = attention.kernel_for

    def wrong(kernel, q, k, v, mask):
        out, log_sum_exp = kernel(q, k, v, torch.zeros_like(mask) if fault == "mask" else mask)
        if fault == "base 2":
            log_sum_exp = log_sum_exp / math.log(2)
        if fault == "hidden":
            log_sum_exp = torch.where(log_sum_exp < -1e4, 0.0, log_sum_exp)
        return out, log_sum_exp * math.nan if fault == "nan" else log_sum_exp

    monkeypatch.setattr(attention, "kernel_for", lambda *args, **kwargs: partial(wrong, kernel_for(*args, **kwargs)))
    found = gpu_attention.fused_attention("cpu", NOWHERE)
    assert found.state == "failed"
    assert found.text.endswith("% off matrix products here")


def test_float32_does_without_a_fused_kernel_on_a_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "compute_dtype", lambda *_, **__: torch.float32)
    nothing = Outcome("not applicable", "there is no fused kernel for float32 here")
    assert gpu_attention.fused_attention("cuda", NOWHERE) == nothing


# The sampler


def test_padded_steps_are_transformers_own(computing):
    found = gpu_checks.engine("cpu", NOWHERE)
    assert found.state == "ok", found
    assert str(computing).removeprefix("torch.") in found.text


def test_other_greedy_tokens_are_found(monkeypatch):
    real = DecoderOnly._forward
    monkeypatch.setattr(DecoderOnly, "_forward", lambda self, *arguments: real(self, *arguments).roll(1, dims=-1))
    found = gpu_checks.engine("cpu", NOWHERE)
    assert found.state == "failed"
    assert "greedy tokens are not those of transformers for 6 of 6 prompts" in found.text


def test_forced_tokens_that_are_read_in_wrong_places_are_found(computing, monkeypatch):
    real = step_inputs._fill_multi

    def fill(inputs, multi, shape):
        real(inputs, multi, shape)
        inputs.multi_query_position[:] = [0] * len(inputs.multi_query_position)

    monkeypatch.setattr(step_inputs, "_fill_multi", fill)
    found = gpu_checks.engine("cpu", NOWHERE)
    assert found.state == "failed"
    assert "nats off those of transformers" in found.text


# 4 bit


def test_a_four_bit_layer_is_that_of_its_weights(computing):
    assert gpu_checks.four_bit("cpu", NOWHERE).state == "ok"


@pytest.mark.parametrize("fault", ["one row", "all", "gradient", "nan", "weights"])
def test_a_wrong_four_bit_layer_is_found(computing, monkeypatch, fault):
    real = gpu_checks.quantised

    def broken(original, device, dtype):
        layer, weights = real(original, device, dtype)
        if fault == "weights":  # and the layer with them: quantised wrongly
            return (lambda inputs: 2 * layer(inputs)), 2 * weights

        def call(inputs):
            out = layer(inputs)
            if fault == "nan":
                return out * float("nan")
            if fault == "gradient":
                out = out + 0.1 * inputs.sum(-1, keepdim=True) - 0.1 * inputs.detach().sum(-1, keepdim=True)
            return 1.05 * out if fault == "all" or (fault == "one row" and len(inputs) == 1) else out

        return call, weights

    monkeypatch.setattr(gpu_checks, "quantised", broken)
    found = gpu_checks.four_bit("cpu", NOWHERE)
    assert found.state == "failed"
    words = {"one row": "a product with one row", "gradient": "a gradient", "weights": "4-bit weights are"}
    assert words.get(fault, "of a 4-bit layer is") in found.text


# unsloth, with the stand-in of test_precision.py


def test_a_step_of_unsloth_is_compared_with_a_plain_one(fast, tmp_path):
    gpu_checks.write_plain_step(tmp_path)
    found = gpu_checks.unsloth_step("cpu", tmp_path)
    assert found.state == "ok", found
    assert "loss 7.0" in found.text


def test_an_unsloth_whose_step_differs_is_found(fast, tmp_path, monkeypatch):
    gpu_checks.write_plain_step(tmp_path)
    create = adapters.create

    def scaled(model, recipe, *, seed):
        return create(model, recipe.model_copy(update={"alpha": 2 * recipe.alpha}), seed=seed)

    monkeypatch.setattr(adapters, "create", scaled)
    found = gpu_checks.unsloth_step("cpu", tmp_path)
    assert found.state == "failed"
    assert found.text.startswith("unsloth's step differs from the plain one here (loss ")


def test_without_unsloth_there_is_nothing_to_compare(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_checks.plain_step("cuda", NOWHERE) == Outcome("not applicable", "not installed")


def test_what_only_a_gpu_has_is_not_applicable_on_a_cpu():
    for check in (gpu_checks.graphs, gpu_checks.plain_step, gpu_memory.memory_cap, gpu_memory.memory_plan):
        assert check("cpu", NOWHERE).state == "not applicable"


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.name)
def test_this_gpu_passes(check, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path))
    (result,) = gpu_check.run_checks([check])
    assert result.state in ("ok", "not applicable") or (check.name == "memory" and result.state == "note"), result


@pytest.mark.gpu
def test_graphs_that_return_other_logits_are_found_on_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    real = Graphs.__call__

    def scaled(self, *arguments):
        return real(self, *arguments) * 1.125

    monkeypatch.setattr(Graphs, "__call__", scaled)
    assert gpu_checks.compare_replays("cuda").state == "failed"
