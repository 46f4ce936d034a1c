"""How an exported file was proved, in words and as a table: from the `proof` in the metrics of the stage `export`."""

from collections.abc import Iterator, Mapping
from typing import Any

BASES = {"dequantized": "the dequantised 4-bit base", "original": "the original 16-bit base"}
COLUMNS = ("MB", "dev", "95 %\ninterval", "lost", "won", "KL to\n16 bit", "same\ntop token", "tokens\nper s")


def sentences(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence each on tokens, probabilities, answers, and how the base to merge onto was chosen."""
    proof, quant = metrics["proof"], metrics["quant"]
    if proof is None:
        yield "not proved: llama-cpp-python could not be loaded; once it can, delete the file and export it again"
        return
    exact, quantized, answers, merges = (proof[key] for key in ("exact", "quantized", "answers", "merges"))
    yield (
        f"proved: {proof['num_prompts']} prompts have training's token ids, from BOS to stop token; mean KL from "
        f"float32 to 16 bit {exact['kl']:.1e} nats on {exact['num_rationales']} rationales"
    )
    if quantized:
        yield (
            f"{quant} beside 16 bit, on {quantized['num_rationales']} rationales: mean KL {quantized['kl']:.4f} nats "
            f"(95 % interval {quantized['kl_low']:.4f} to {quantized['kl_high']:.4f}), same top token "
            f"{quantized['same_top']:.1%} ({quantized['same_top_low']:.1%} to {quantized['same_top_high']:.1%})"
        )
    if answers:
        before = answers["num_right"] + answers["num_lost"] - answers["num_won"]
        yield (
            f"{answers['num_problems']} {answers['part']} problems: the file solves {answers['num_right']}, the "
            f"sampler {before}; {answers['num_same']} answers are the same text, {answers['num_lost']} lost, "
            f"{answers['num_won']} won"
        )
    if merges:
        kept, other = sorted(BASES, key=lambda name: name != metrics["merge"])
        yield (
            f"merged onto {BASES[kept]}, which solves {merges[kept]} of {merges['num_problems']} dev problems; onto "
            f"{BASES[other]} {merges[other]}"
        )


def sizes(proof: Mapping[str, Any] | None) -> list[tuple[str, list[str]]]:
    """Return a row of `COLUMNS` for each type that --quant auto measured, smallest first.

    Answers are lost and won beside 16 bit.
    """
    found = proof["sizes"] if proof else ()
    return [(one["quant"], _row(one)) for one in sorted(found, key=lambda one: one["num_bytes"])]


def _row(size: Mapping[str, Any]) -> list[str]:
    answers, divergence = size["answers"], size["divergence"]
    return [
        f"{size['num_bytes'] / 1e6:,.0f}",
        f"{answers['num_right'] / answers['num_problems']:.1%}",
        f"{100 * answers['low']:.1f}–{answers['high']:.1%}",
        str(answers["num_lost"]),
        str(answers["num_won"]),
        f"{divergence['kl']:.4f}" if divergence else "",
        f"{divergence['same_top']:.1%}" if divergence else "",
        f"{answers['tokens_per_second']:.0f}",
    ]


def for_page(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the proof for the report's page, from the metrics of the stage; empty without one."""
    if "proof" not in metrics:
        return {}
    return {
        "sentences": list(sentences(metrics)),
        "columns": COLUMNS,
        "sizes": sizes(metrics["proof"]),
        "chosen": metrics["quant"],
    }
