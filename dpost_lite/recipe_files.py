"""Recipe files: find and read one, apply `key=value` overrides, and explain what is wrong with a key or value."""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from dpost_lite.errors import RecipeError, nearest
from dpost_lite.recipe import Recipe


def recipes_dir() -> Path:
    """Return the folder of the recipes that ship with the package."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def load_recipe(source: str | Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by name or path (None: the defaults) and apply `key=value` overrides; dots separate nested keys.

    Raises RecipeError naming the file and key, with the nearest known name.
    """
    values = _read_yaml(_locate(str(source))) if source is not None else {}
    set_keys(values, overrides or [])
    return validate(values, where=str(source) if source is not None else "recipe")


def set_keys(values: dict[str, Any], overrides: list[str]) -> None:
    """Set each `key=value` in nested `values`, without validating them; the last value of a key wins."""
    for override in overrides:
        _set_key(values, override)


def validate(values: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a Recipe from nested values. Raises RecipeError for the first unknown key or bad value."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from error


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"--recipe: there is no file {source}; give the path of a .yaml file, or a recipe's name")
        return path
    known = sorted(p.stem for p in recipes_dir().glob("*.yaml"))
    if source not in known:
        raise RecipeError(
            f"--recipe: there is no recipe {source}{nearest(source, known)}; known: {', '.join(known)}, or a .yaml file"
        )
    return recipes_dir() / f"{source}.yaml"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:  # ValueError: not UTF-8, or an invalid date
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"--recipe: {path} cannot be read as YAML ({reason}); fix the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"--recipe: {path} must contain keys and values, not a {type(values).__name__}")
    return values


def _set_key(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"'{override}' is not of the form key=value, for example sft.epochs=3")
    try:
        value = yaml.safe_load(text) if text else None
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    value = _plain_number(value)
    *parents, last = key.strip().split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"{key}: '{parent}' is a value, not a section; remove one of the two")
        node = child
    node[last] = value


def _plain_number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; users mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        siblings = _keys_of(first["loc"][:-1])
        return f"unknown key '{key}'{nearest(str(first['loc'][-1]), siblings)}; known here: {', '.join(siblings)}"
    given = f" (given: {first['input']!r})" if isinstance(first["input"], str | int | float) else ""
    hint = nearest(first["input"], _choices_of(first)) if isinstance(first["input"], str) else ""
    return f"{key}: {first['msg'].removeprefix('Value error, ')}{given}{hint}"


def _keys_of(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _choices_of(error: Any) -> list[str]:
    section: Any = Recipe
    for part in error["loc"]:
        annotation = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else None
        section = annotation
    if get_origin(section) in (Union, types.UnionType):
        section = next((a for a in get_args(section) if get_origin(a) is Literal), None)
    return [str(choice) for choice in get_args(section)] if get_origin(section) is Literal else []
