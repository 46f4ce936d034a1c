"""What we call of unsloth, checked against the source in its wheel: only its import needs a GPU."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import dpost_lite

TESTS = Path(__file__).parent
OUR_SOURCE = Path(dpost_lite.__file__).parent / "models" / "unsloth_backend.py"
OURS = ast.parse(OUR_SOURCE.read_text(encoding="utf-8"))
API = "FastLanguageModel"


# Ours


def calls(tree: ast.AST) -> dict[str, ast.Call]:
    """Return our calls of FastLanguageModel's methods, by the method's name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return {node.func.attr: node for node in found if ast.unparse(node.func.value) == API}


def variables(tree: ast.AST) -> set[str]:
    """Return the names of the environment variables that we set."""
    return {
        ast.literal_eval(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.setdefault"
    }


METHODS = sorted(calls(OURS))


# Theirs


def signature(function: ast.FunctionDef) -> inspect.Signature:
    """Return a function's signature without *args and **kwargs, which accept any name; defaults are syntax trees."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    required: list[Any] = [inspect.Parameter.empty] * (len(positional) - len(arguments.defaults))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(argument.arg, kind, default=default)
        for argument, default in zip(positional, [*required, *arguments.defaults], strict=True)
    ]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        value = inspect.Parameter.empty if default is None else default
        parameters.append(inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=value))
    return inspect.Signature(parameters)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield what an import of a module runs on a GPU machine, that is without unsloth's branch for Apple's MLX."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "_IS_MLX":
            yield from statements(statement.orelse)
        elif isinstance(statement, (ast.If, ast.Try)):
            handlers = [line for handler in getattr(statement, "handlers", []) for line in handler.body]
            yield from statements([*statement.body, *handlers, *statement.orelse])


def reads(node: ast.AST, variable: str) -> bool:
    """Whether an expression reads an environment variable."""
    match node:
        case ast.Call(func=function, args=[ast.Constant(value=name), *_]):
            return name == variable and ast.unparse(function) in ("os.environ.get", "os.getenv")
        case ast.Subscript(value=owner, slice=ast.Constant(value=name), ctx=ast.Load()):
            return name == variable and ast.unparse(owner) == "os.environ"
        case ast.Compare(left=ast.Constant(value=name), comparators=[owner]):
            return name == variable and ast.unparse(owner) == "os.environ"
    return False


def holds(expression: str, name: str) -> bool:
    """Whether an expression has this variable or one derived from it, as `old_model_name` of `model_name`."""
    return re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", expression) is not None


class Source:
    """The text of packages, by path in the wheel. It is parsed, never imported."""

    def __init__(self, files: Mapping[str, str], version: str = "test") -> None:
        self.files = files
        self.version = version
        self._trees: dict[str, ast.Module] = {}

    def __repr__(self) -> str:
        return f"unsloth {self.version}"

    def path(self, module: str) -> str:
        path = module.replace(".", "/")
        return next((p for p in (f"{path}.py", f"{path}/__init__.py") if p in self.files), path)

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            path = self.path(module)
            if path not in self.files:
                raise LookupError(f"{self} has no module {module}")
            self._trees[module] = ast.parse(self.files[path])
        return self._trees[module]

    def definition(self, module: str, name: str) -> tuple[str, ast.AST]:
        """Return the module that defines what `module` has under `name`, and the class, function or value.

        Raises LookupError if there is none.
        """
        package = module if self.path(module).endswith("__init__.py") else module.rpartition(".")[0]
        for statement in statements(self.tree(module).body):
            match statement:
                case ast.ClassDef() | ast.FunctionDef() if statement.name == name:
                    return module, statement
                case ast.Assign(targets=[ast.Name(id=target)]) if target == name:
                    return module, statement.value
                case ast.ImportFrom(level=level) if level:
                    origin = importlib.util.resolve_name("." * level + (statement.module or ""), package)
                    for alias in statement.names:
                        if name == (alias.asname or alias.name):
                            return self.definition(origin, alias.name)
                        if alias.name == "*" and self._exports(origin, name):
                            with suppress(LookupError):
                                return self.definition(origin, name)
        raise LookupError(f"{self}: {module} has no {name}")

    def _exports(self, module: str, name: str) -> bool:
        """Whether `from module import *` would bring `name`."""
        for statement in self.tree(module).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
                return name in ast.literal_eval(statement.value)
        return not name.startswith("_")

    def method(self, module: str, owner: str, name: str) -> tuple[str, ast.FunctionDef]:
        """Return the module and the function of a method, of its own class or inherited."""
        module, found = self.definition(module, owner)
        if not isinstance(found, ast.ClassDef):
            raise LookupError(f"{self}: {owner} is not a class")
        for statement in found.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return module, statement
        for base in found.bases:
            try:
                return self.method(module, ast.unparse(base), name)
            except LookupError:
                continue
        raise LookupError(f"{self}: {owner} has no {name}")

    def called(self, module: str, function: ast.FunctionDef) -> Iterator[tuple[ast.Call, str, ast.FunctionDef]]:
        """Yield the calls of the same method of another class of theirs: the call, the module, and the function called.

        A variable stands for each class that may be assigned to it.
        """
        nodes = list(ast.walk(function))
        for node in nodes:
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=function.name)):
                    assigned = {
                        value.id
                        for other in nodes
                        if isinstance(other, ast.Assign) and ast.unparse(other.targets[0]) == owner
                        for value in ast.walk(other.value)
                        if isinstance(value, ast.Name)
                    }
                    for name in sorted(assigned or {owner}):
                        try:
                            yield node, *self.method(module, name, function.name)
                        except LookupError:
                            continue  # transformers' or peft's

    def implementation(self, name: str) -> tuple[str, ast.FunctionDef]:
        """Return the function that names the arguments of a method of FastLanguageModel: its own or its base's."""
        module, function = self.method("unsloth", API, name)
        for call, target_module, target in self.called(module, function):
            if ast.unparse(call).endswith("(model, *args, **kwargs)"):
                return target_module, target
        return module, function

    def lost(self, module: str, function: ast.FunctionDef, names: set[str]) -> list[str]:
        """Return the line and name of each argument that does not reach the class that a method hands its work to."""
        found, own = [], set(signature(function).parameters)
        for call, target_module, target in self.called(module, function):
            wanted = list(signature(target).parameters)
            given = dict(zip(wanted, map(ast.unparse, call.args), strict=False))
            given |= {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}
            handed = {name for name in names if holds(given.get(name, ""), name) or (name not in own and "**" in given)}
            found += [f"{module}:{call.lineno} {name}" for name in sorted(names & set(wanted) - handed)]
            if target is not function:
                found += self.lost(target_module, target, handed)
        return found

    def default(self, module: str, node: Any) -> Any:
        """Return a default's value. A constant made by a class of theirs from one value counts as that value."""
        if isinstance(node, ast.Name):
            module, node = self.definition(module, node.id)
        if isinstance(node, ast.Call):
            (node,) = node.args
        return node if node is inspect.Parameter.empty else ast.literal_eval(node)

    def readers(self, variable: str) -> list[str]:
        """Return the files that read an environment variable."""
        named = [path for path, text in self.files.items() if variable in text]
        return [path for path in named if any(reads(node, variable) for node in ast.walk(ast.parse(self.files[path])))]


# The wheels


def download(requirements: list[str], folder: Path) -> None:
    """Fetch wheels without their dependencies; skip the test if there is no network or no pip."""
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=0"]
    command = [sys.executable, "-m", "pip", "download", *options, "--timeout=15", "--dest", str(folder), *requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        pytest.skip("unsloth's wheel took over 3 minutes to download")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")] or ["no message"]
        if "from versions: " in done.stderr and "from versions: none" not in done.stderr:
            pytest.fail(f"no version of unsloth is in pyproject's range: {lines[-1]}")
        pytest.skip(f"pip cannot fetch unsloth's wheel (offline?): {lines[-1]}")


@pytest.fixture(scope="module", params=["lowest", "newest"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The lowest version that pyproject allows, and the newest."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["optional-dependencies"]["unsloth"]
    if request.param == "lowest":
        asked = [Requirement(line) for line in requirements]
        requirements = [
            f"{one.name}=={spec.version}" for one in asked for spec in one.specifier if spec.operator == ">="
        ]
    folder = tmp_path_factory.mktemp(request.param)
    download(requirements, folder)
    files, versions = {}, {}
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        versions[name] = version
        with zipfile.ZipFile(wheel) as archive:
            paths = [path for path in archive.namelist() if path.startswith(f"{name}/") and path.endswith(".py")]
            files |= {path: archive.read(path).decode() for path in paths}
        wheel.unlink()
    assert versions.keys() == {"unsloth", "unsloth_zoo"}
    return Source(files, f"{versions['unsloth']} with unsloth_zoo {versions['unsloth_zoo']}")


def test_all_that_we_import_is_exported(source: Source) -> None:
    imports = [node for node in ast.walk(OURS) if isinstance(node, ast.ImportFrom) and node.module == "unsloth"]
    assert [alias.name for node in imports for alias in node.names] == [API]
    for method in METHODS:
        _, function = source.method("unsloth", API, method)
        assert "staticmethod" in map(ast.unparse, function.decorator_list), f"{source}: {method}"


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_has_its_name_and_is_used(source: Source, method: str) -> None:
    call = calls(OURS)[method]
    module, function = source.implementation(method)
    try:
        bound = bind(function, call)
    except TypeError as error:
        pytest.fail(f"{source}: {method}: {error}")
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert bound <= used, f"{source}: {method} ignores {bound - used}"
    assert source.lost(module, function, bound) == [], source


def bind(function: ast.FunctionDef, call: ast.Call) -> set[str]:
    """Return the names of the parameters that a call fills; raises TypeError if it does not fit."""
    keywords = {keyword.arg or "**": None for keyword in call.keywords}
    return set(signature(function).bind(*call.args, **keywords).arguments)


def test_the_check_follows_each_family_of_models(source: Source) -> None:
    """The test above looks at each class that from_pretrained hands a model to: here, that it finds them."""
    module, function = source.implementation("from_pretrained")
    followed = {ast.unparse(call.func) for call, *_ in source.called(module, function)}
    assert followed == {"dispatch_model.from_pretrained", "FastModel.from_pretrained"}, source
    classes = {target_module for _, target_module, _ in source.called(module, function)}
    assert classes >= {f"unsloth.models.{name}" for name in ("llama", "mistral", "qwen2", "qwen3", "loader")}, source


@pytest.mark.parametrize("method", METHODS)
def test_the_way_of_checkpointing_is_one_it_knows(source: Source, method: str) -> None:
    (value,) = (word.value for word in calls(OURS)[method].keywords if word.arg == "use_gradient_checkpointing")
    module, function = source.implementation(method)
    name = "apply_unsloth_gradient_checkpointing"
    assert name in {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}, source
    _, applied = source.definition(module, name)
    compared = {ast.unparse(node) for node in ast.walk(applied) if isinstance(node, ast.Compare)}
    assert f"use_gradient_checkpointing == {ast.unparse(value)}" in compared, source


def test_a_name_becomes_another_unless_it_is_exact(source: Source) -> None:
    (exact,) = (w.value for w in calls(OURS)["from_pretrained"].keywords if w.arg == "use_exact_model_name")
    assert ast.literal_eval(exact) is True
    _, function = source.implementation("from_pretrained")
    renamed = lookups(function)
    guarded = [
        line
        for node in ast.walk(function)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "not use_exact_model_name"
        for statement in node.body
        for line in lookups(statement)
    ]
    assert renamed, source
    assert renamed == sorted(guarded), source
    assert any(
        isinstance(node, ast.Constant) and str(node.value).endswith("-bnb-4bit")
        for node in ast.walk(source.tree("unsloth.models.mapper"))
    ), source


def lookups(tree: ast.AST) -> list[int]:
    """Return the lines that look a model's name up among those of quantised copies."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sorted(node.lineno for node in found if ast.unparse(node.func) == "get_model_name")


def test_a_fresh_adapter_is_put_on_its_kernels(source: Source) -> None:
    _, function = source.implementation("get_peft_model")
    called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    assert any(name.endswith(".patch_peft_model") for name in called), source


@pytest.mark.parametrize("variable", sorted(variables(OURS)))
def test_every_variable_is_read(source: Source, variable: str) -> None:
    assert source.readers(variable), f"{source} does not read {variable}"


def test_generated_code_would_go_into_the_current_folder(source: Source) -> None:
    name, tree = "UNSLOTH_COMPILE_LOCATION", source.tree("unsloth_zoo.compiler")
    run = [line for line in statements(tree.body) if isinstance(line, ast.Assign)]  # by an import
    assert any(reads(line.value, name) for line in run), f"{source} does not read {name} when it is imported"
    values = [line.value for line in run if ast.unparse(line.targets[0]) == name]
    defaults = [str(value.value) for value in values if isinstance(value, ast.Constant)]
    assert defaults, source
    assert not any(Path(default).is_absolute() for default in defaults), f"{source}: {defaults}"


def test_the_stand_in_has_the_real_signatures(source: Source) -> None:
    """The training tests run our module on the stand-in of test_precision.py."""
    tree = ast.parse((TESTS / "test_precision.py").read_text(encoding="utf-8"))
    (stand_in,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == API)
    functions = [node for node in stand_in.body if isinstance(node, ast.FunctionDef)]
    assert sorted(function.name for function in functions) == METHODS
    for function in functions:
        module, real = source.implementation(function.name)
        parameters = signature(real).parameters
        expected = {name: source.default(module, parameter.default) for name, parameter in parameters.items()}
        ours = {
            name: source.default("", parameter.default) for name, parameter in signature(function).parameters.items()
        }
        assert ours == {name: expected[name] for name in ours if name in expected}, f"{source}: {function.name}"
        assert [name for name in expected if name in ours] == list(ours), f"{source}: the order of {function.name}"


# What the checks above find, on a package that is wrong on purpose

FAKE = {
    "unsloth/__init__.py": "if _IS_MLX:\n    class FastLanguageModel: ...\nelse:\n    from .models import *",
    "unsloth/models/__init__.py": "from .loader import FastLanguageModel",
    "unsloth/models/llama.py": """
class Llama:
    @staticmethod
    def get_peft_model(model, r=16, bias='none', **kwargs):
        return r
    @staticmethod
    def from_pretrained(model_name=NAME, dtype=None, **kwargs):
        return model_name, dtype
NAME = Text('a/b')
""",
    "unsloth/models/loader.py": """
import os
from .llama import Llama
class FastLanguageModel(Llama):
    @staticmethod
    def get_peft_model(model, *args, **kwargs):
        return Llama.get_peft_model(model, *args, **kwargs)
    @staticmethod
    def from_pretrained(model_name, dtype=None, **kwargs):
        dispatch = Llama
        os.environ['SET'] = os.environ.get('READ', 'here')
        return dispatch.from_pretrained(model_name=get_model_name(model_name), **kwargs)
""",
}


def test_the_checks_find_what_is_missing() -> None:
    source = Source(FAKE)
    module, peft = source.implementation("get_peft_model")
    assert (module, list(signature(peft).parameters)) == ("unsloth.models.llama", ["model", "r", "bias"])
    assert bind(peft, ast.parse("f(m, r=1)", mode="eval").body) == {"model", "r"}
    for wrong in ("f(m, rank=1)", "f(r=1)", "f(m, 1, r=1)", "f(m, **more)"):
        with pytest.raises(TypeError):
            bind(peft, ast.parse(wrong, mode="eval").body)

    module, load = source.implementation("from_pretrained")
    assert source.lost(module, load, {"model_name", "dtype"}) == ["unsloth.models.loader:12 dtype"]
    assert source.readers("READ") == ["unsloth/models/loader.py"]
    assert source.readers("SET") == []
    assert lookups(load) == [12]
    assert holds("_get(load_in_4bit_kwargs)", "load_in_4bit")
    assert not holds("lora_alpha", "r")
    target_module, target = source.method("unsloth.models.llama", "Llama", "from_pretrained")
    assert source.default(target_module, signature(target).parameters["model_name"].default) == "a/b"
    with pytest.raises(LookupError, match="FastLanguageModel has no for_training"):
        source.method("unsloth", API, "for_training")
    with pytest.raises(LookupError, match="unsloth has no FastModel"):
        source.definition("unsloth", "FastModel")
    hidden = {**FAKE, "unsloth/models/__init__.py": "from .loader import FastLanguageModel\n__all__ = ['Other']"}
    with pytest.raises(LookupError, match="unsloth has no FastLanguageModel"):
        Source(hidden).definition("unsloth", API)
