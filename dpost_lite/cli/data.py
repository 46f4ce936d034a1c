"""The command `data`: show how problems are read."""

from typing import Annotated

import typer

from dpost_lite.cli.options import DataDir, Debug, Model, Offline, choice
from dpost_lite.cli.resolve import default_recipe, overrides


def data(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A set or a file, as --data of run.")],
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="train|test", help="Which part of a set. [default: train, where it can be trained on]"),
    ] = None,
    model: Model = None,
    offline: Offline = False,
    debug: Debug = False,
) -> None:
    """Show how problems are read: format, counts, three samples as they are trained on, refused rows."""
    from rich.console import Console

    from dpost_lite.cli.inspect_data import describe
    from dpost_lite.recipe_files import load_recipe

    if split is not None:
        choice("--split", split, {"train": None, "test": None})
    recipe = load_recipe(default_recipe(source), overrides(model=model, data_dir=data_dir))
    console = Console()
    for text in describe(source, recipe, split=split):
        console.print(text, soft_wrap=True)
