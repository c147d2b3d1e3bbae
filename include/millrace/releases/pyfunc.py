"""How MLflow loads a release: `mlflow.pyfunc.load_model(uri, model_config={"index_builds": folder})`.

Needs the installed package and index builds, but no Millrace server: a release holds no documents, and an answer
without them would not be the release's. Builds are in a folder (`<home>/indexes/<environment>/<application>`) or on a
Qdrant server: `{"qdrant_url": …, "environment": …}`. A release whose model a server has needs `upstream_url`. All that
`model_config` takes is in `package.LOAD_CONFIG`; MLflow reads the same from `MLFLOW_PYFUNC_INFERENCE_CONFIG`.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import SecretStr

from millrace.engines.upstream import Upstream
from millrace.errors import EngineError, ReleaseError, RetrievalError
from millrace.releases.embedding import open_embedder
from millrace.releases.generator import open_engine
from millrace.releases.manifest import Manifest
from millrace.releases.package import LOAD_CONFIG, read_release
from millrace.releases.pipeline import Answer, AnswerPipeline
from millrace.retrieval.builds import Builds
from millrace.retrieval.library import LibraryBuilds
from millrace.retrieval.search import Retriever
from millrace.retrieval.server import connect
from millrace.retrieval.service import ServiceBuilds, collection_name
from millrace.settings import Settings


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> "PyfuncRelease":
    """Called by MLflow. Raises as `open_pipeline`."""
    config = {**LOAD_CONFIG, **(model_config or {})}
    return PyfuncRelease(open_pipeline(Path(path), config), config["index_build"] or None)


def open_pipeline(folder: Path, config: dict[str, Any]) -> AnswerPipeline:
    """The release in a local folder, loaded, with nothing but `config` (all keys of `LOAD_CONFIG`).

    Raises:
        ReleaseError: no index builds were named, or the model's files are not whole.
        EngineError: the weights can't be loaded, or the server that has the model doesn't answer.
        RetrievalError: the embedding model can't be loaded.
    """
    manifest = read_release(folder)
    builds = _builds(config, manifest)
    threads = config["threads"] or os.cpu_count() or 1
    embedder = open_embedder(manifest, folder, cache=Path(config["cache"]).expanduser(), threads=threads)
    engine = open_engine(
        manifest.generator,
        folder,
        upstream=Upstream(config["upstream_url"], SecretStr(config["upstream_api_key"])),
        threads=threads,
        cache_gb=config["cache_gb"],
    )
    return AnswerPipeline(manifest, engine, Retriever(builds, embedder))


def load_config(settings: Settings, application: str, index_build: str) -> dict[str, Any]:
    """What `model_config` is in this deployment, to answer from `index_build`."""
    return LOAD_CONFIG | {
        "index_builds": str(settings.index_builds(application)),
        "qdrant_url": settings.qdrant_url,
        "qdrant_api_key": settings.qdrant_api_key.get_secret_value(),
        "environment": settings.environment,
        "index_build": index_build,
        "cache": str(settings.cache),
        "threads": settings.threads,
        "cache_gb": settings.engine_cache_gb,
        "upstream_url": settings.upstream_url,
        "upstream_api_key": settings.upstream_api_key.get_secret_value(),
    }


def _builds(config: dict[str, Any], manifest: Manifest) -> Builds:
    lineage = manifest.retrieval.lineage
    if config["qdrant_url"] and config["environment"]:
        collection = collection_name(config["environment"], manifest.application, lineage)
        return ServiceBuilds(connect(config["qdrant_url"], SecretStr(config["qdrant_api_key"])), collection)
    if config["index_builds"]:
        return LibraryBuilds(Path(config["index_builds"]) / lineage)
    raise ReleaseError(
        'a release answers from an index: load it with model_config={"index_builds": "<home>/indexes/<environment>/'
        '<application>"}, or {"qdrant_url": "https://<host>:<port>", "environment": "<environment>"}; for a command, '
        "the same as JSON in MLFLOW_PYFUNC_INFERENCE_CONFIG"
    )


AT_ONCE = 8
"""Questions that are answered together: what continuous batching is for."""


class PyfuncRelease:
    """A release as MLflow calls it."""

    def __init__(self, pipeline: AnswerPipeline, index_build: str | None) -> None:
        self._pipeline = pipeline
        self._index_build = index_build

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers to the column `question`, in its order: `answer`, `citations` (chunk ids, best first),
        `prompt_tokens`, `completion_tokens`.

        Raises:
            MlflowException: a question can't be answered (MLflow's server says 400), or nothing can now (503).
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

        try:
            with ThreadPoolExecutor(AT_ONCE, "predict") as pool:
                answers = list(pool.map(self._answer, model_input["question"]))
        except ReleaseError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        except (EngineError, RetrievalError) as error:
            raise MlflowException(str(error), error_code=TEMPORARILY_UNAVAILABLE) from error
        return pd.DataFrame(
            {
                "answer": [answer.text for answer in answers],
                "citations": [[hit.chunk_id for hit in answer.citations] for answer in answers],
                "prompt_tokens": [answer.usage.prompt_tokens for answer in answers],
                "completion_tokens": [answer.usage.completion_tokens for answer in answers],
            },
            index=model_input.index,
        )

    def _answer(self, question: str) -> Answer:
        return self._pipeline.answer(question, build=self._index_build)
