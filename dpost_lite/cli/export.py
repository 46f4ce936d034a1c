"""The command `export`: write a policy of a run, or any adapter or model, as a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from dpost_lite.cli.options import Debug, Offline, Policy, file_size
from dpost_lite.errors import ExportError


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run's folder, an adapter's folder, or a model.")],
    quant: Annotated[str, typer.Option(metavar="q4_k_m|q5_k_m|q8_0|f16", help="Quantisation of the weights.")],
    policy: Policy = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base of an adapter. [default: the one it names]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file to write. [default: RUN/export/model-QUANT.gguf, or exports/NAME/model-QUANT.gguf]",
        ),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Also write the adapter alone, as adapter.gguf.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload file, card and Modelfile to the hub; a new repository is private."
        ),
    ] = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Export a run's best policy, or the one given by --policy, as a GGUF file; or an adapter on its base, or a model.

    A model card (README.md) and a Modelfile for Ollama are written beside the file.
    """
    from dpost_lite.evaluation.upload import HubUpload

    hub = HubUpload(push_to_hub) if push_to_hub else None  # before the slow imports
    from dpost_lite.evaluation import publish
    from dpost_lite.pipeline.export import export_gguf
    from dpost_lite.pipeline.streaming import export_lora

    exported = publish.find_export(source, quant=quant.lower(), policy=policy, base=model, out=out)
    file = exported.file
    if file.exists():
        typer.echo(f"{file} already exists ({file_size(file)}); delete it to write it again")
    else:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                f"--out: {file.parent} cannot be created ({error.strerror}); give another folder"
            ) from error
        typer.echo(f"writing {file} …")
        export_gguf(exported.recipe, exported.model_dir, exported.policy_dir, file)
        typer.echo(f'{file_size(file)} written; next: dpost-lite solve {file} "…"')
    beside = publish.write_beside(exported)
    if lora:
        beside.append(export_lora(exported.model_dir, exported.policy_dir, file.with_name("adapter.gguf")))
    typer.echo(f"beside it: {', '.join(path.name for path in beside)}")
    if hub is not None:
        names = [file.name, publish.CARD, publish.MODELFILE, *(path.name for path in beside[2:])]
        typer.echo(f"uploaded: {hub.upload(list(zip([file, *beside], names, strict=True)))}")
