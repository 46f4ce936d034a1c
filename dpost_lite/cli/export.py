"""The command `export`: write a policy of a run, or any adapter or model, as a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpost_lite.cli.options import Debug, Offline, Policy, file_size
from dpost_lite.errors import ExportError, RecipeError

if TYPE_CHECKING:
    from dpost_lite.evaluation.model_card import Release


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A run's folder, an adapter's folder, or a model.")],
    quant: Annotated[
        str,
        typer.Option(
            metavar="q4_k_m|q5_k_m|q6_k|q8_0|f16|auto",
            help="Quantisation of the weights; auto takes the smallest that answers the dev problems as well.",
        ),
    ],
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
    lora: Annotated[bool, typer.Option("--lora", help="Also write the adapter alone, as FILE-adapter.gguf.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Upload file, card and Modelfile to the hub; a new repository is private."
        ),
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
    """Export a run's best policy, or the one given by --policy, as a GGUF file; or an adapter on its base, or a model.

    The file is compared with the policy: token ids, probabilities, and greedy answers to the run's problems. A model
    card (README.md) and a Modelfile for Ollama are written beside it; Ollama cannot run encoder–decoders (T5).
    """
    from dpost_lite.evaluation.upload import HubUpload

    if max_loss is not None and quant.lower() != "auto":
        raise RecipeError("--max-loss is for --quant auto; leave it out")
    hub = HubUpload(push_to_hub) if push_to_hub else None  # before the slow imports
    from dpost_lite.evaluation import publish
    from dpost_lite.local import t5
    from dpost_lite.pipeline.streaming import adapter_alone, export_lora

    settings = {"quant": quant.lower(), "max_loss": max_loss, "merge": merge}
    release = publish.find_release(source, settings, policy=policy, base=model, out=out)
    file, adapter = release.file, adapter_alone(release.model_dir, release.policy_dir) if lora else None
    if file.exists():
        _check_is_of(release)
        typer.echo(f"{file} already exists ({file_size(file)}); delete it to write it again")
    else:
        _write(release)
    beside = publish.write_beside(release)
    if adapter is not None:
        beside.append(export_lora(release.model_dir, adapter, file.with_name(f"{file.stem}-adapter.gguf")))
    typer.echo(f"beside it: {', '.join(path.name for path in beside)}")
    if not release.runs_elsewhere:
        typer.echo(t5.ONLY_HERE)
    if hub is not None:
        names = [file.name, publish.CARD, *(path.name for path in beside[1:])]
        typer.echo(f"uploaded: {hub.upload(list(zip([file, *beside], names, strict=True)))}")


def _check_is_of(release: "Release") -> None:
    """Raise ExportError if the file, which exists, is none, or another export: it would get the wrong card."""
    from dpost_lite.pipeline.export import holds

    file = release.file
    if file.is_dir():
        raise ExportError(f"--out: {file} is a folder; give the file to write, ending in .gguf")
    if not holds(file, release.recipe, release.model_dir, release.policy_dir):
        raise ExportError(f"{file} already exists and is another export; delete it, or give another name with --out")


def _write(release: "Release") -> None:
    """Write and prove the file, and show the proof."""
    from rich.console import Console

    from dpost_lite.cli.proof import show_proof
    from dpost_lite.pipeline.export import export_gguf

    file, recipe, run = release.file, release.recipe, release.target.run
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"--out: {file.parent} cannot be created ({error.strerror}); give another folder") from error
    typer.echo(f"writing {file} …")
    with Console(stderr=True).status("merging and comparing") as status:
        exported = export_gguf(
            recipe,
            release.model_dir,
            release.policy_dir,
            file,
            run=run.path if run else None,
            stage=release.policy if run and release.policy_dir else None,
            solves=recipe.solutions != "code",
            progress=lambda done, total, unit: status.update(f"{done} of {total} {unit}"),
        )
    show_proof(exported.metrics)
    typer.echo(f'{file_size(file)} written; next: dpost-lite solve {file} "…"')
