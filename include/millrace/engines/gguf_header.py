"""Looks at a GGUF file before an engine does: whether all of it is there, and what its metadata says.

OpenVINO ends the process (a segmentation fault) on a truncated file, so nothing reaches it unchecked. Reads the
header only, not the weights. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from millrace.errors import EngineError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LARGEST = 1 << 24
"""No count, text or list in the header of an honest file is longer."""

Value = str | int | float | bool


@dataclass(frozen=True)
class GgufHeader:
    """Metadata without its arrays, by key."""

    metadata: dict[str, Value]
    tensors: int

    @property
    def context_tokens(self) -> int:
        """Most tokens that the model was made for.

        Raises:
            EngineError: the file doesn't say.
        """
        architecture = self.metadata.get("general.architecture")
        found = self.metadata.get(f"{architecture}.context_length")
        if not isinstance(found, int) or found < 1:
            raise EngineError(f"the GGUF file states no context length for {architecture!r}; export it again")
        return found


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the model file at `path`.

    Raises:
        EngineError: it isn't a file, isn't GGUF, has no weights, or ends before its last weight.
    """
    if path.is_dir():
        raise EngineError(f"{path} is a directory; name its .gguf file (a directory without one has no weights)")
    if not path.is_file():
        raise EngineError(f"{path} does not exist; a generator needs a .gguf file")
    size = path.stat().st_size
    if not size:
        raise EngineError(f"{path} is empty; copy or export the model again")
    try:
        with path.open("rb") as file:
            header, needed = _read(file)
    except (struct.error, UnicodeDecodeError, ValueError, KeyError, RecursionError) as error:
        raise EngineError(f"{path} is not a readable GGUF file ({error}); copy or export the model again") from None
    if not header.tensors:
        raise EngineError(f"{path} holds no weights; export the model again")
    if size < needed:
        raise EngineError(f"{path} is cut off: {size} bytes of {needed}; copy or export the model again")
    return header


def _read(file: BinaryIO) -> tuple[GgufHeader, int]:
    """The header, and how many bytes the whole file must have."""
    magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
    version, tensors, pairs = _unpack(file, "I"), _unpack(file, "Q"), _unpack(file, "Q")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is unknown")
    if tensors > _LARGEST or pairs > _LARGEST:
        raise ValueError("its counts are absurd")
    metadata: dict[str, Value] = {}
    for _ in range(pairs):
        key = _string(file)
        value = _value(file, _unpack(file, "I"))
        if value is not None:
            metadata[key] = value
    end = 0
    for _ in range(tensors):
        _string(file)
        shape = [_unpack(file, "Q") for _ in range(_unpack(file, "I"))]
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(_unpack(file, "I"))]
        end = max(end, _unpack(file, "Q") + prod(shape) // block * block_bytes)
    alignment = int(metadata.get("general.alignment", 32))
    return GgufHeader(metadata, tensors), -(-file.tell() // alignment) * alignment + end


def _value(file: BinaryIO, kind: int) -> Value | None:
    """One metadata value; None for an array, which is skipped."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])
    item, length = _unpack(file, "I"), _unpack(file, "Q")
    if length > _LARGEST:
        raise ValueError("an array's length is absurd")
    if item in _SCALARS:
        file.seek(length * struct.calcsize(_SCALARS[item]), 1)
        return None
    for _ in range(length):
        _value(file, item)
    return None


def _string(file: BinaryIO) -> str:
    length = _unpack(file, "Q")
    if length > _LARGEST:
        raise ValueError("a string's length is absurd")
    return file.read(length).decode(errors="replace")


def _unpack(file: BinaryIO, kind: str) -> int:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]
