"""A GGUF file read, and written again with other or fewer tensors. Metadata and tokenizer stay; one tensor at a time is
in memory.

It knows the file format; which tensor becomes what is its caller's.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millrace.engines.gguf_header import read_gguf_header
from millrace.errors import EngineError

Floats = npt.NDArray[np.float32]


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of the file at `path`, which stays on the disk until a tensor is read.

    Raises:
        EngineError: it isn't a whole GGUF file.
    """
    from gguf import GGUFReader

    read_gguf_header(path)  # the reader believes whatever it finds
    return GGUFReader(path)


def read_fields(reader: Any) -> dict[str, Any]:
    """Metadata by key, arrays included."""
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def read_weights(tensor: Any) -> Floats:
    """A reader's tensor as floats, rows first.

    Raises:
        EngineError: its format can't be read, or it holds what is not a number.
    """
    from gguf import dequantize

    try:
        weights: Floats = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise EngineError(
            f"tensor {tensor.name} is in {tensor.tensor_type.name}, which can't be read; use a file in F16 or Q8_0"
        ) from None
    if not np.isfinite(weights).all():
        raise EngineError(f"tensor {tensor.name} holds values that are not numbers; train or export the model again")
    return weights


def rewrite(
    reader: Any,
    target: Path,
    *,
    kinds: Mapping[str, Any],
    encode: Callable[[Any], npt.NDArray[Any]],
    fields: Mapping[str, Any] | None = None,
    names: Mapping[str, str | None] | None = None,
) -> None:
    """Write the model that `reader` has open to `target`, whole or not at all.

    Args:
        kinds: name → `GGMLQuantizationType` of the tensors that change; the others keep their bytes.
        encode: a changed tensor → its new rows, bytes where the type is a quantised one.
        fields: metadata that changes; each key must be there already.
        names: name → new name, of the tensors that get another one; None: the tensor is left out.
    """
    from gguf import GGML_QUANT_SIZES, GGUFWriter

    known = read_fields(reader)
    known |= fields or {}
    named = [(tensor, (names or {}).get(tensor.name, tensor.name)) for tensor in reader.tensors]
    tensors = [(tensor, name) for tensor, name in named if name is not None]
    building = target.with_name(f".{target.name}.{os.getpid()}")
    writer = GGUFWriter(building, known["general.architecture"])
    for name, field in reader.fields.items():
        if name == "general.alignment":
            writer.add_custom_alignment(known[name])
        elif name in known and name != "general.architecture":
            types = [*field.types, None]
            writer.add_key_value(name, known[name], types[0], types[1])
    for tensor, name in tensors:
        kind = kinds.get(tensor.name, tensor.tensor_type)
        block, size = GGML_QUANT_SIZES[kind]
        shape = [int(length) for length in reversed(tensor.shape)]
        # The type is named, so what numpy would call it doesn't matter.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(tensor.n_elements) // block * size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, _ in tensors:
            rows = encode(tensor) if tensor.name in kinds else np.asarray(tensor.data)
            writer.write_tensor_data(np.ascontiguousarray(rows))
        writer.close()
        with building.open("rb") as file:
            os.fsync(file.fileno())
        building.replace(target)
    finally:
        writer.close()
        building.unlink(missing_ok=True)
