"""The command `export`: write a policy of a run as a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug, Offline, Policy, file_size
from dpost_lite.errors import ExportError


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    quant: Annotated[
        str,
        typer.Option(
            metavar="q4_k_m|q5_k_m|q6_k|q8_0|f16|auto",
            help="Quantisation of the weights; auto takes the smallest that answers the dev problems as well.",
        ),
    ],
    policy: Policy = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write. [default: RUN/export/model-QUANT.gguf]")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Dev accuracy that --quant auto may lose against 16 bit. [default: 1.0]"),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(
            metavar="dequantized|original|auto",
            help="The base to merge an adapter onto, if it was trained in 4 bit. [default: as in the run's recipe]",
        ),
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Export a run's best policy, or the one given by --policy, as a GGUF file.

    The file is compared with the policy: token ids, probabilities, and greedy answers to the run's problems.
    """
    from rich.console import Console

    from dpost_lite.cli.proof import show_proof
    from dpost_lite.evaluation.targets import finished_export, policy_dir
    from dpost_lite.models import hub
    from dpost_lite.pipeline.export import export_gguf
    from dpost_lite.recipe_files import validate
    from dpost_lite.runs.folder import Run

    opened = Run.open(source)
    recipe = opened.recipe
    for key, value in (("quant", quant.lower()), ("max_loss", max_loss), ("merge", merge)):
        if value is not None:
            settings = {**recipe.export.model_dump(), key: value}
            recipe = validate({**recipe.model_dump(), "export": settings}, where=f"--{key.replace('_', '-')}")
    finished = {} if policy and out else finished_export(opened)
    stage = policy or finished["policy"]
    adapter_dir = policy_dir(opened, stage)
    name = "-".join(["model", *(policy.split("/") if policy else []), recipe.export.quant])
    file = out or source / "export" / f"{name}.gguf"
    if file.exists():
        typer.echo(f"{file} already exists ({file_size(file)}); delete it to write it again")
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"--out: {file.parent} cannot be created ({error.strerror}); give another folder") from error
    typer.echo(f"writing {file} …")
    with Console(stderr=True).status("merging and comparing") as status:
        exported = export_gguf(
            recipe,
            hub.find(recipe.model.name),
            adapter_dir,
            file,
            run=source,
            stage=None if adapter_dir is None else stage,
            solves=recipe.solutions != "code",
            progress=lambda done, total, unit: status.update(f"{done} of {total} {unit}"),
        )
    show_proof(exported.metrics)
    typer.echo(f'{file_size(exported.file)} written; next: dpost-lite solve {exported.file} "…"')
