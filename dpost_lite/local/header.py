"""Read the header of a GGUF file: its settings, and whether it is whole.

llama.cpp may end the process over a damaged file, so a file is walked through here first. `gguf.GGUFReader` would do,
but takes seconds to unpack a vocabulary that nobody asked it for; this skips over arrays.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from dpost_lite.errors import ExportError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_header(path: Path) -> dict[str, Any]:
    """Return the settings of a GGUF file, without those that are arrays.

    Raises ExportError if the file is missing, is not GGUF version 2 or 3, or ends within the header or before the last
    tensor begins (llama.cpp itself refuses one that ends later).
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ExportError(f"{path} is not a GGUF file; name one that export wrote")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(data).settings()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}; name a .gguf file that export wrote") from error
    except (struct.error, ValueError, LookupError) as error:
        raise ExportError(f"{path} is damaged or cut off ({error}); export or copy it again") from error


class _Walk:
    """A place in the file's bytes that moves on with each value taken."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4

    def settings(self) -> dict[str, Any]:
        version, num_tensors, num_settings = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        settings = {}
        for _ in range(num_settings):
            name = self._string()
            value = self._value(self._scalar("I"))
            if value is not None:
                settings[name] = value
        last_offset = max((self._tensor_offset() for _ in range(num_tensors)), default=0)
        if self._at + last_offset >= len(self._data):
            raise ValueError("tensors are missing")
        return settings

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return value

    def _string(self) -> str:
        start = self._skip(self._scalar("Q"))
        return self._data[start : self._at].decode()

    def _skip(self, num_bytes: int) -> int:
        """Move on by `num_bytes`; return where they begin."""
        start = self._at
        self._at += num_bytes
        if self._at > len(self._data):
            raise ValueError("the header is cut off")
        return start

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._scalar("Q"))
        else:
            self._skip(length * struct.calcsize("<" + _SCALARS[kind]))
        return None

    def _tensor_offset(self) -> int:
        """Pass over one tensor's name, shape and type; return where its data begins, after the header."""
        self._string()
        self._skip(8 * self._scalar("I"))
        self._scalar("I")
        return self._scalar("Q")
