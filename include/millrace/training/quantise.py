"""A model file in another number format: fewer bits a weight, the same model.

Formats are GGUF's, in blocks of 32 weights that share a scale; matrices get them, norms stay as they are. 4-bit blocks
are fitted to what the engine computes: OpenVINO keeps a block's zero point as a whole number
(`make_int4_weights` in openvino.genai's `gguf_utils/building_blocks.cpp`), so a Q4_1 block whose minimum is no whole
multiple of its scale is read up to half a step beside what the file says. Here zero points are whole, and any reader
sees the same weights. It loads no model; `compress.py` does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millrace.engines.gguf_file import Floats, open_gguf, read_weights, rewrite
from millrace.engines.openvino import READABLE
from millrace.errors import TrainingError

BLOCK = 32
"""Weights that share a scale."""
LEVELS = 15
"""Of 4 bits: the largest code."""
STRETCHES = (-0.8, -0.4, 0.0, 0.4, 0.8)
"""How many levels wider or narrower than a block's range its scale is tried."""
SLICE = 1 << 15
"""Blocks that are fitted together: what fits a processor's cache."""
LARGEST = float(np.finfo(np.float16).max)
SMALLEST = 1e-12

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """A way to write a model."""

    matrices: str
    """GGUF's name of the blocks' tensors' type."""
    embeddings: str
    """And of the embedding's and the output's, which 4 bits cost most; at 8 they are a fifth of a small model."""
    file_type: int
    """`general.file_type`; with 1 (F16) the engine looks for no scales."""


FORMATS: Mapping[str, Format] = {
    "f16": Format("F16", "F16", 1),
    "q8_0": Format("Q8_0", "Q8_0", 7),
    "q4_1": Format("Q4_1", "Q8_0", 3),
    "q4_0": Format("Q4_0", "Q8_0", 2),
}
EMBEDDINGS = ("token_embd.weight", "output.weight")


def write_quantised(source: Path, target: Path, name: str) -> None:
    """Write the model in `source` to `target` in the format called `name`, whole or not at all.

    Tensors that have their type already keep their bytes.

    Raises:
        EngineError: `source` isn't a whole GGUF file, or a weight in it is not a number.
        TrainingError: the engine can't read that format, or nothing here can write it; the model has it already, or
            doesn't fit it.
    """
    wanted = known_format(name)
    reader = open_gguf(source)
    kinds = _kinds(reader, wanted)
    if not kinds:
        raise TrainingError(f"{source.name} is in {name} already; there is nothing to do")
    if "general.file_type" not in reader.fields:
        raise TrainingError(f"{source.name} doesn't say its format (general.file_type); export the model again")
    for tensor in reader.tensors:
        if tensor.name not in kinds:
            read_weights(tensor)  # A value that is no number is found whether its bytes change or not.
    rewrite(
        reader,
        target,
        kinds=kinds,
        encode=lambda tensor: _encode(tensor, kinds[tensor.name].name),
        fields={"general.file_type": wanted.file_type},
    )


def known_format(name: str) -> Format:
    """Raises:
    TrainingError: no model can be written in the format called `name`.
    """
    if name in FORMATS:
        return FORMATS[name]
    if name.upper() in READABLE:
        raise TrainingError(f"the engine reads {name}, but nothing here writes it; choose one of {', '.join(FORMATS)}")
    raise TrainingError(f"the engine can't read {name!r}; choose one of {', '.join(FORMATS)}")


def in_format(source: Path, name: str) -> bool:
    """Whether the model in `source` is in the format called `name` already. Raises as `write_quantised`."""
    return not _kinds(open_gguf(source), known_format(name))


def saved_bytes(source: Path, name: str) -> int:
    """By how much the model in `source` would shrink in the format called `name`; negative: it would grow. Raises as
    `write_quantised`."""
    from gguf import GGML_QUANT_SIZES

    reader = open_gguf(source)
    kinds = _kinds(reader, known_format(name))
    saved = 0
    for tensor in reader.tensors:
        if tensor.name in kinds:
            block, size = GGML_QUANT_SIZES[kinds[tensor.name]]
            saved += int(tensor.n_bytes) - int(tensor.n_elements) // block * size
    return saved


def quantised_name(name: str, format_name: str) -> str:
    """The file name of a model called `name` in another format: its own, with the format before `.gguf`."""
    stem = name.removesuffix(".gguf")
    base, _, last = stem.rpartition(".")
    if base and last.upper() in READABLE:
        stem = base
    return f"{stem}.{format_name.upper()}.gguf"


def encode_q4_1(blocks: Floats) -> Bytes:
    """Blocks of 32 weights, (n, 32), as Q4_1, (n, 20) bytes: w = scale · code + minimum, codes 0 to 15.

    The minimum is a whole multiple of the scale (see above), and 0 is always in the range.
    """
    low = np.minimum(blocks.min(axis=1, keepdims=True), 0)
    high = np.maximum(blocks.max(axis=1, keepdims=True), 0)
    zero = np.rint(LEVELS * -low * _inverse(high - low))
    scale, codes = _fitted(blocks, (high - low) / LEVELS, zero, LEVELS)
    return np.concatenate([_half(scale), _half(-zero * scale), _packed(codes)], axis=1)


def encode_q4_0(blocks: Floats) -> Bytes:
    """Blocks of 32 weights, (n, 32), as Q4_0, (n, 18) bytes: w = scale · (code − 8), codes 0 to 15."""
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    zero = np.full_like(furthest, 8)
    scale, codes = _fitted(blocks, furthest / np.float32(-8), zero, 8)
    return np.concatenate([_half(scale), _packed(codes)], axis=1)


def _fitted(blocks: Floats, widest: Floats, zero: Floats, levels: int) -> tuple[Floats, Bytes]:
    """Each block's scale, of several near `widest`, that loses least, and its codes.

    Given the codes, the scale is the least-squares one; as `make_qx_quants` of llama.cpp (ggml-quants.c) does it.

    Args:
        widest: (n, 1), the scale with which `levels` steps reach the block's furthest weight.
        zero: (n, 1), the code of weight 0.
    """
    best = np.full_like(widest, np.inf)
    chosen = np.zeros_like(widest)
    for stretch in STRETCHES:
        tried = widest * (levels / (levels + stretch))
        steps = np.clip(np.rint(blocks * _inverse(tried)) + zero, 0, LEVELS) - zero
        scale = (blocks * steps).sum(axis=1, keepdims=True) * _inverse((steps * steps).sum(axis=1, keepdims=True))
        scale = scale.astype(np.float16).astype(np.float32)
        loss = ((blocks - scale * steps) ** 2).sum(axis=1, keepdims=True)
        better = loss < best
        best = np.where(better, loss, best)
        chosen = np.where(better, scale, chosen)
    codes = np.clip(np.rint(blocks * _inverse(chosen)) + zero, 0, LEVELS)
    return chosen, codes.astype(np.uint8)


def _kinds(reader: Any, wanted: Format) -> dict[str, Any]:
    """The tensors that `wanted` changes → their new type."""
    from gguf import GGMLQuantizationType

    kinds = {}
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            continue
        kind = GGMLQuantizationType[wanted.embeddings if tensor.name in EMBEDDINGS else wanted.matrices]
        if tensor.tensor_type != kind:
            kinds[tensor.name] = kind
    return kinds


def _encode(tensor: Any, kind: str) -> npt.NDArray[Any]:
    """A reader's tensor as `kind`, rows first."""
    from gguf import GGMLQuantizationType, quantize

    weights = read_weights(tensor)
    furthest = float(np.abs(weights).max())
    if furthest > LARGEST:
        raise TrainingError(
            f"tensor {tensor.name} has a weight of {furthest:.3g}, half precision ends at {LARGEST:g}; the model is "
            "broken, train or export it again"
        )
    rows, columns = weights.shape[0], weights.shape[-1]
    if kind != "F16" and columns % BLOCK:
        raise TrainingError(
            f"tensor {tensor.name} has rows of {columns} weights, {kind} needs a multiple of {BLOCK}; choose f16"
        )
    encoders: dict[str, Callable[[Floats], Bytes]] = {"Q4_0": encode_q4_0, "Q4_1": encode_q4_1}
    if kind not in encoders:
        encoded: npt.NDArray[Any] = quantize(weights, GGMLQuantizationType[kind])
        return encoded
    blocks = weights.reshape(-1, BLOCK)
    parts = [encoders[kind](blocks[start : start + SLICE]) for start in range(0, len(blocks), SLICE)]
    return np.concatenate(parts).reshape(rows, -1)


def _inverse(values: Floats) -> Floats:
    """1 / values; 0 where a block holds next to nothing, which half precision can't tell from 0."""
    return np.divide(1, values, out=np.zeros_like(values), where=np.abs(values) > SMALLEST)


def _half(values: Floats) -> Bytes:
    return values.astype(np.float16).view(np.uint8)


def _packed(codes: Bytes) -> Bytes:
    """Codes of 4 bits, two a byte: the first half of a block in the low bits."""
    return (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)
