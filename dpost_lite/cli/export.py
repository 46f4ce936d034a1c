"""The command `export`: write a policy of a run as a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug, Offline, Policy, file_size
from dpost_lite.errors import ExportError


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    quant: Annotated[str, typer.Option(metavar="q4_k_m|q5_k_m|q8_0|f16", help="Quantisation of the weights.")],
    policy: Policy = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write. [default: RUN/export/model-QUANT.gguf]")
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Export a run's best policy, or the one given by --policy, as a GGUF file."""
    from dpost_lite.evaluation.targets import finished_export, policy_dir
    from dpost_lite.models import hub
    from dpost_lite.pipeline.export import export_gguf
    from dpost_lite.recipe_files import validate
    from dpost_lite.runs.folder import Run

    opened = Run.open(source)
    recipe = validate({**opened.recipe.model_dump(), "export": {"quant": quant.lower()}}, where="--quant")
    finished = {} if policy and out else finished_export(opened)
    adapter_dir = policy_dir(opened, policy or finished["policy"])
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
    export_gguf(recipe, hub.find(recipe.model.name), adapter_dir, file)
    typer.echo(f'{file_size(file)} written; next: dpost-lite solve {file} "…"')
