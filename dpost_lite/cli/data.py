"""The command `data`: show how problems are read from a set or file."""

from typing import Annotated

import typer

from dpost_lite.cli.options import DataDir, Debug, Model, Offline, choice
from dpost_lite.cli.resolve import default_recipe, overrides


def data(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="The name of a set, or a file, as for `run --data`.")],
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="train|test", help="Part of a named set. [default: train if available]"),
    ] = None,
    model: Model = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Show how problems are read: format, counts, refused rows, and three samples as the model sees them."""
    from rich.console import Console

    from dpost_lite.cli.inspect_data import preview
    from dpost_lite.recipe_files import load_recipe

    if split is not None:
        choice("--split", split, {"train": None, "test": None})
    recipe = load_recipe(default_recipe(source), overrides(model=model, data_dir=data_dir))
    console = Console()
    for text in preview(source, recipe, split=split):
        console.print(text, soft_wrap=True)
