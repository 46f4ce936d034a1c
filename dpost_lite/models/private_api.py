"""What reaches into private parts of transformers, trl and bitsandbytes. No other module here does.

Each function says what it touches and what breaks if that changes. Checked with transformers 5.17 to 5.23, trl 1.14 and
1.16, and bitsandbytes 0.50; the version caps in pyproject.toml guard these names. (`sampling/` sets a model's
`_attn_implementation`, which transformers documents for custom attention functions.)
"""

from collections.abc import Sequence
from typing import Any


def mark_unquantized(model: Any) -> None:
    """Make a dequantised model count as a plain one, so that it can be merged and saved.

    Touches a transformers model's `config.quantization_config`, `is_loaded_in_4bit`, `is_quantized` and
    `hf_quantizer`. If they change, saving a dequantised model raises an error.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_loaded_in_4bit = model.is_quantized = False
    model.hf_quantizer = None


def keep_differentiable(model: Any) -> None:
    """Stop bitsandbytes from repacking weights in place on AVX512-BF16 CPUs.

    After one forward without gradients its packed kernel, which has no backward, would also serve training: gradients
    are cut without an error (cosine to the true one 0.77 on average) and a merge reads garbage. Harmless elsewhere.
    Touches `Linear4bit.support_avx512bf16_for_cpu`; if it changes, tests/test_precision.py fails on such CPUs.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def token_dpo_trainer() -> type:
    """Return trl's DPOTrainer for rows of token ids: prompt_ids, chosen_ids and rejected_ids are taken as they are.

    Overrides `DPOTrainer._prepare_dataset`, which would tokenise text and append a stop token to every answer, even to
    one that was cut off. If it is renamed, trl raises an error about missing text columns.
    """
    from trl import DPOTrainer

    class TokenDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return TokenDPOTrainer


def draw_by_length(trainer: Any, lengths: Sequence[int]) -> None:
    """Have a Trainer draw its rows, of `lengths` tokens, with `order.ByLength`.

    Replaces `Trainer._get_train_sampler`; if it is renamed, tests/test_dpo.py and tests/test_seq2seq.py fail.
    """
    from dpost_lite.models.order import ByLength

    micro, seed = trainer.args.train_batch_size, trainer.args.data_seed or 0
    sampler = ByLength(lengths, micro * trainer.args.gradient_accumulation_steps, micro, seed=seed)
    trainer._get_train_sampler = lambda *_: sampler


def skip_pickles(trainer: Any) -> None:
    """Keep a Trainer from reading its own checkpoint files, which are pickles; `Checkpoints` restores ours.

    Replaces four `Trainer._load_…` methods. Raises RuntimeError if transformers has renamed one.
    """
    for name in ("from_checkpoint", "optimizer_and_scheduler", "scaler", "rng_state"):
        method = f"_load_{name}"
        if not hasattr(trainer, method):
            raise RuntimeError(f"transformers has no Trainer.{method}; see the version caps in pyproject.toml")
        setattr(trainer, method, lambda *_: None)


def loss_of(trainer: Any, model: Any, batch: Any) -> Any:
    """Return a trainer's loss on one collated batch, moved to the device by `Trainer._prepare_inputs`."""
    return trainer.compute_loss(model, trainer._prepare_inputs(batch))


def forget_batches(trainer: Any) -> None:
    """Drop what a trainer of trl, or of seq2seq_trainers.py, counted so far: `_metrics` and `_total_train_tokens`.

    If they change, the first logged step also averages in the batches of `training.probe`.
    """
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
