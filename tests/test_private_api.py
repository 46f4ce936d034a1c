"""Private parts of transformers, trl, peft and bitsandbytes are reached from one module."""

import ast
from collections.abc import Iterator
from pathlib import Path

import dpost_lite

OURS = ("dpost_lite/models/private_api.py",)
ALLOWED = {
    "self", "cls", "run",  # of the class around it
    "self._forcer",  # of a class in the same module
    "os", "torch.cpu", "torch.ops.mkldnn", "torch.ops.aten",  # other packages', without an alternative
    "self._model.config",  # _attn_implementation, which transformers documents for custom attention functions
}  # fmt: skip


def private_attributes(source: str) -> Iterator[str]:
    """Yield `owner.name` for each attribute with one leading underscore."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield f"{ast.unparse(node.value)}.{node.attr}"


def test_no_other_module_reaches_private_parts() -> None:
    package = Path(dpost_lite.__file__).parent
    found = {
        f"{path.relative_to(package.parent).as_posix()}: {name}"
        for path in package.rglob("*.py")
        if path.relative_to(package.parent).as_posix() not in OURS
        for name in private_attributes(path.read_text(encoding="utf-8"))
        if name.rpartition(".")[0] not in ALLOWED
    }
    assert found == set()


def test_the_check_finds_them() -> None:
    assert sorted(private_attributes("trainer._metrics.clear(); a.b._c = self._d")) == [
        "a.b._c", "self._d", "trainer._metrics",
    ]  # fmt: skip
