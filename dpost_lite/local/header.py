"""Read a GGUF file's metadata and check that the file is complete.

llama.cpp may abort on a damaged file, so files are checked here first. `gguf.GGUFReader` would work too, but takes
seconds to unpack the vocabulary; this reader skips arrays.
"""

import mmap
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_header(path: Path, *, arrays: Collection[str] = ()) -> dict[str, Any]:
    """Return the metadata of a GGUF file, of arrays only those of strings that are named in `arrays`.

    Raises ExportError if the file is missing, is not GGUF version 2 or 3, or is cut off before the start of the last
    tensor (llama.cpp itself rejects files cut off later).
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ExportError(f"{path} is not a GGUF file; give a .gguf file from `dpost-lite export`")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data).settings(arrays)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); give a file from `dpost-lite export`") from error
    except (struct.error, ValueError, LookupError) as error:
        raise ExportError(f"{path} is damaged or truncated ({error}); export or copy it again") from error


class _Cursor:
    """A position in the file's bytes that advances with each value read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 4

    def settings(self, arrays: Collection[str]) -> dict[str, Any]:
        version, num_tensors, num_settings = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        settings = {}
        for _ in range(num_settings):
            name = self._string()
            value = self._value(self._scalar("I"), keep=name in arrays)
            if value is not None:
                settings[name] = value
        last_offset = max((self._tensor_offset() for _ in range(num_tensors)), default=0)
        if self._position + last_offset >= len(self._data):
            raise ValueError("tensors are missing")
        return settings

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self._position)
        self._position += struct.calcsize("<" + form)
        return value

    def _string(self) -> str:
        start = self._skip(self._scalar("Q"))
        return self._data[start : self._position].decode()

    def _skip(self, num_bytes: int) -> int:
        """Advance by `num_bytes`; return the position before."""
        start = self._position
        self._position += num_bytes
        if self._position > len(self._data):
            raise ValueError("the header is truncated")
        return start

    def _value(self, kind: int, *, keep: bool) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind == _STRING and keep:
            return [self._string() for _ in range(length)]
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._scalar("Q"))
        else:
            self._skip(length * struct.calcsize("<" + _SCALARS[kind]))
        return None

    def _tensor_offset(self) -> int:
        """Skip one tensor's name, shape and type; return its data's offset from the end of the header."""
        self._string()
        self._skip(8 * self._scalar("I"))
        self._scalar("I")
        return self._scalar("Q")
