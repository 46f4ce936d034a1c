"""Show how an exported file was proved."""

from collections.abc import Mapping
from typing import Any


def show_proof(metrics: Mapping[str, Any]) -> None:
    """Print the proof in the metrics of an export; nothing for a file of an older version."""
    from rich.console import Console

    from dpost_lite.report import proof, summary
    from dpost_lite.report.terminal import plain

    if "proof" not in metrics:
        return
    console = Console()
    if rows := proof.sizes(metrics["proof"]):
        table = summary.table_of(*proof.COLUMNS)
        for name, cells in rows:
            table.add_row(plain(name), *cells)
        console.print("", table, "")
    chosen = [f"chosen: {metrics['quant']}"] if rows else []
    for text in [*chosen, *proof.sentences(metrics)]:
        console.print(plain(text), soft_wrap=True)
