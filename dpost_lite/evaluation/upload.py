"""Upload an exported file, its model card and its Modelfile to the Hugging Face hub (`export --push-to-hub`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError


class HubUpload:
    """A repository `name` (owner/name) on the hub to upload to.

    Made before the file is: raises ExportError if the name is not valid, the hub cannot be reached or is forbidden, or
    nobody is logged in.
    """

    def __init__(self, name: str) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import validate_repo_id

        self._name = name
        if constants.HF_HUB_OFFLINE:
            raise ExportError("--push-to-hub: --offline (or HF_HUB_OFFLINE) forbids asking the hub; leave it out")
        self._api: Any = HfApi(library_name="dpost-lite")
        with self._in_one_line():
            validate_repo_id(name)
            if name.count("/") != 1:
                raise ExportError(f"--push-to-hub: {name} is not a hub id; give owner/name")
            self._api.whoami()

    def upload(self, files: Sequence[tuple[Path, str]]) -> str:
        """Commit `files`, each with its name on the hub; return the commit's address.

        A new repository is private; one that exists keeps its visibility and its other files. Raises ExportError if it
        fails; nothing is visible on the hub before all files are there.
        """
        from huggingface_hub import CommitOperationAdd

        with self._in_one_line():
            self._api.create_repo(self._name, private=True, exist_ok=True)
            operations = [CommitOperationAdd(name, path) for path, name in files]
            message = f"Upload {files[0][1]} with dpost-lite"
            return str(self._api.create_commit(self._name, operations, commit_message=message).commit_url)

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Turn what the hub's client raises into an ExportError."""
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            HTTPError,  # of the HTTP library, which differs by version
            LocalTokenNotFoundError,
        )

        try:
            yield
        except HFValidationError as error:
            raise ExportError(f"--push-to-hub: {self._name} is not a hub id; give owner/name") from error
        except LocalTokenNotFoundError as error:
            raise ExportError(
                "--push-to-hub: you are not logged in; run `hf auth login` with a token that may write, or set HF_TOKEN"
            ) from error
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise ExportError(
                    f"--push-to-hub: the hub refuses the token for {self._name} ({status}); run `hf auth login` with "
                    "a token that may write there"
                ) from error
            way_out = "try again later" if status is None or status == 429 or status >= 500 else "check the name"
            raise ExportError(f"--push-to-hub: the hub reports an error ({_words(error)}); {way_out}") from error
        except ValueError as error:  # of the card's metadata, or a reply that is no JSON
            raise ExportError(
                f"--push-to-hub: the hub refuses the upload ({_words(error)}); correct the licence in the base's "
                "README.md and repeat the command"
            ) from error
        except (OSError, HTTPError) as error:
            raise ExportError(
                f"--push-to-hub: the hub cannot be reached ({_words(error)}); what is exported stays, so repeat the "
                "command once it can"
            ) from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
