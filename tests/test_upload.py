"""`export --push-to-hub`, against a hub that runs in this process and speaks the few calls that an upload makes."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_gguf import save_model


@dataclass
class FakeHub:
    """What a client asked for: repositories it created, and the files of its commits."""

    address: str = ""
    token: str = "hf_good"
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    validated: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    """What is wrong with a card's metadata."""


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _answer(self, body: bytes) -> None:
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._send({"error": "Invalid credentials in Authorization header"}, 401)
            if self.path == "/api/whoami-v2":
                return self._send({"name": "me", "type": "user"})
            if self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                return self._send({"url": f"{hub.address}/me/tiny"})
            if self.path == "/api/validate-yaml":  # the model card's metadata
                hub.validated.append(json.loads(body))
                return self._send({"errors": hub.wrong, "warnings": []}, 400 if hub.wrong else 200)
            if self.path.endswith("/preupload/main"):
                files = json.loads(body)["files"]
                return self._send(
                    {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]}
                )
            if "/commit/main" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                return self._send({"commitUrl": f"{hub.address}/me/tiny/commit/1", "commitOid": "1", "success": True})
            return self._send({"error": "not found"}, 404)

        def _send(self, answer: dict[str, Any], status: int = 200) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the model `model`."""
    path = tmp_path_factory.mktemp("upload")
    save_model(path / "model", "llama", "smollm")
    return path


def push(folder: Path, address: str, *more: str, name: str = "me/tiny", **variables: str) -> Any:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {
        **kept, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"),
        **variables,
    }  # fmt: skip
    command = [sys.executable, "-m", "dpost_lite", "export", "model", "--quant", "q8_0", "--push-to-hub", name, *more]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_file_card_and_modelfile_are_uploaded_to_a_private_repository(folder, fake_hub):
    done = push(folder, fake_hub.address, HF_TOKEN="hf_good")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"uploaded: {fake_hub.address}/me/tiny/commit/1\n")
    assert [repo["name"] for repo in fake_hub.created] == ["tiny"]
    assert fake_hub.created[0].get("private") or fake_hub.created[0].get("visibility") == "private"
    assert [card["repoType"] for card in fake_hub.validated] == ["model"]
    local = folder / "exports" / "model"
    assert fake_hub.files == {
        name: (local / name).read_bytes() for name in ("model-q8_0.gguf", "README.md", "Modelfile")
    }


@pytest.mark.parametrize(
    ("more", "name", "variables", "message"),
    [
        ((), "me/tiny", {"HF_TOKEN": "hf_bad"}, "the hub refuses the token for me/tiny (401); run `hf auth login`"),
        ((), "me/tiny", {}, "you are not logged in; run `hf auth login`"),
        ((), "tiny", {"HF_TOKEN": "hf_good"}, "tiny is not a hub id; give owner/name"),
        ((), "a b/c", {"HF_TOKEN": "hf_good"}, "a b/c is not a hub id; give owner/name"),
        (("--offline",), "me/tiny", {"HF_TOKEN": "hf_good"}, "--offline (or HF_HUB_OFFLINE) forbids asking the hub"),
    ],
)
def test_what_stops_an_upload_is_one_line_before_anything_is_exported(folder, fake_hub, more, name, variables, message):
    done = push(folder, fake_hub.address, *more, "--out", "new/x.gguf", name=name, **variables)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"dpost-lite: --push-to-hub: {message}")
    assert done.stderr.count("\n") == 1
    assert not fake_hub.created
    assert not (folder / "new").exists()


def test_a_card_that_the_hub_refuses_is_one_line(folder, fake_hub):
    fake_hub.wrong = [{"message": '"license" must be one of [apache-2.0]'}]
    done = push(folder, fake_hub.address, HF_TOKEN="hf_good")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "dpost-lite: --push-to-hub: the hub refuses the upload (Invalid metadata in README.md"
    )
    assert "correct the licence" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not fake_hub.files


def test_a_hub_that_cannot_be_reached_is_one_line(folder):
    done = push(folder, "http://127.0.0.1:9", HF_TOKEN="hf_good")
    assert done.returncode == 2
    assert done.stderr.startswith("dpost-lite: --push-to-hub: the hub cannot be reached (")
    assert done.stderr.count("\n") == 1
