"""What was trained becomes a file that the engine reads: the base model's GGUF with an adapter merged in, or with all
its weights replaced.

What was trained is written as Q8_0; so are tensors that training didn't touch and that the engine would read otherwise
than they were trained beside. The others keep their bytes. It knows the file format, and nothing of how the weights
came about.

Rounding is stochastic (Gupta et al., 2015, arXiv:1502.02551): up as often as the value is near the upper step. What a
fine-tune adds to a weight is far less than a step of Q8_0. Where the base is in Q8_0 too, rounding to the nearest step
gives back the base, and what was learnt is lost.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from millrace.applications import Generation
from millrace.engines.engine import Engine, Message
from millrace.engines.gguf_file import Floats, open_gguf, read_fields, read_weights, rewrite
from millrace.engines.openvino import misread
from millrace.errors import TrainingError
from millrace.scoring.overlap import token_f1
from millrace.training.quantise import BLOCK

SEED = 0
"""Of the rounding: the same weights, the same file."""
LARGEST_CODE = 127
AGREEMENT = 0.7
"""Mean token-F1 between the exported and the trained model's answers. Quantisation moves single words; a tensor
written wrongly leaves nothing in common."""


def write_merged(base: Path, adapter: Path, target: Path) -> None:
    """Write `base` with the LoRA `adapter` (a folder as peft saves it) merged in to `target`, whole or not at all.

    Weights are W + (alpha / r)·B·A (Hu et al., 2021, arXiv:2106.09685). Metadata and tokenizer are copied.

    Raises:
        TrainingError: the adapter doesn't fit the base model.
    """
    from gguf import GGMLQuantizationType

    reader = open_gguf(base)
    deltas = _deltas(adapter, read_fields(reader))
    if unknown := sorted(deltas.keys() - {tensor.name for tensor in reader.tensors}):
        raise TrainingError(
            f"the adapter {adapter} changes {unknown[0]}, which {base} doesn't have; train on this base"
        )
    random = np.random.default_rng(SEED)
    rewrite(
        reader,
        target,
        kinds=dict.fromkeys(deltas.keys() | misread(reader), GGMLQuantizationType.Q8_0),
        encode=lambda tensor: encode_q8_0(read_weights(tensor) + deltas.get(tensor.name, np.float32(0)), random),
    )


def write_full(base: Path, weights: Path, target: Path) -> None:
    """Write `base` with all its weights replaced by `weights` (safetensors, transformers' names) to `target`, whole or
    not at all: matrices as Q8_0, vectors as F32. Metadata and tokenizer are copied.

    Raises:
        TrainingError: the weights aren't those of the base model.
    """
    from gguf import GGMLQuantizationType
    from safetensors.numpy import load_file

    reader = open_gguf(base)
    named = _named_as_gguf(load_file(weights), read_fields(reader), weights)
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    given = {name: tensor.shape for name, tensor in named.items()}
    if wrong := sorted(name for name in shapes.keys() | given.keys() if given.get(name) != shapes.get(name)):
        raise TrainingError(
            f"{weights} doesn't hold the weights of {base}: the shape of {wrong[0]} is {given.get(wrong[0])} and "
            f"should be {shapes.get(wrong[0])}; train on this base"
        )
    random = np.random.default_rng(SEED)

    def encode(tensor: Any) -> npt.NDArray[Any]:
        rows = named[tensor.name].astype(np.float32)
        return encode_q8_0(rows, random) if rows.ndim > 1 else rows

    matrix, vector = GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
    kinds = {name: matrix if len(shape) > 1 else vector for name, shape in shapes.items()}
    rewrite(reader, target, kinds=kinds, encode=encode)


def encode_q8_0(rows: Floats, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Matrix (n, m) as Q8_0, (n, m / 32 · 34) bytes: blocks of 32 weights, w = scale · code, codes -127 to 127. Rounded
    stochastically (see above).

    Raises:
        TrainingError: the length of a row is no multiple of 32.
    """
    if rows.shape[1] % BLOCK:
        raise TrainingError(f"a matrix has rows of {rows.shape[1]} weights, Q8_0 needs a multiple of {BLOCK}")
    blocks = rows.reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / LARGEST_CODE).astype(np.float16)
    steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    codes = np.floor(steps + random.random(steps.shape, np.float32)).clip(-LARGEST_CODE, LARGEST_CODE)
    encoded = np.concatenate([scale.view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=1)
    return encoded.reshape(len(rows), -1)


def verify_answers(engine: Engine, answers: Sequence[dict[str, str]]) -> float:
    """Mean token-F1 of the engine's answers against the trained model's.

    Args:
        answers: `prompt` (a user message) and `answer` (greedy, at most 32 tokens), as the program writes them.

    Raises:
        TrainingError: they have too little in common: the file isn't what was trained; or there are none.
    """
    if not answers:
        raise TrainingError("a user was erased who asked all that was to be asked of the export; train it again")
    config = Generation(max_new_tokens=32, temperature=0)
    given = [(engine.generate([Message("user", a["prompt"])], config).text, a["answer"]) for a in answers]
    agreement = float(np.mean([token_f1(ours, theirs) for ours, theirs in given]))
    if agreement < AGREEMENT:
        ours, theirs = min(given, key=lambda pair: token_f1(*pair))
        raise TrainingError(
            f"the exported model agrees with the trained one only to {agreement:.2f} (token-F1, at least {AGREEMENT}): "
            f"it answers {ours!r} where {theirs!r} was trained; the export is not used"
        )
    return agreement


def _deltas(adapter: Path, fields: dict[str, Any]) -> dict[str, Floats]:
    """GGUF tensor name → what is added to it."""
    from safetensors.numpy import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    deltas = {}
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        deltas[f"{module}.weight"] = scale * (tensors[key.replace(".lora_A.", ".lora_B.")] @ tensors[key])
    return _named_as_gguf(deltas, fields, adapter)


def _named_as_gguf(tensors: dict[str, Floats], fields: dict[str, Any], origin: Path) -> dict[str, Floats]:
    """Tensors by GGUF's names instead of transformers', with rows in GGUF's order."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = fields["general.architecture"]
    if arch != "llama":
        raise TrainingError(f"the base model is of architecture {arch!r}; only 'llama' can be exported")
    heads = {"q_proj": fields["llama.attention.head_count"], "k_proj": fields["llama.attention.head_count_kv"]}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, fields["llama.block_count"])
    renamed = {}
    for key, weights in tensors.items():
        name = names.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise TrainingError(f"{origin} changes {key}, which GGUF has no name for")
        kind = key.removesuffix(".weight").rsplit(".", 1)[-1]
        renamed[name] = _rotary_rows(weights, heads[kind]) if kind in heads else weights
    return renamed


def _rotary_rows(weights: Floats, heads: int) -> Floats:
    """Rows in GGUF's order: each head's halves, which rotate together, interleaved (`convert_hf_to_gguf.py`)."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
