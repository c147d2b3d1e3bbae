"""From a manifest's generator to the engine that computes it, and from the deployment's choice to a generator.

Which kind of generator a release has is in the release; where its server is, is in the settings.
"""

from pathlib import Path

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.engines.converted import exact_file
from millrace.engines.engine import Engine
from millrace.engines.langchain import LangChainEngine
from millrace.engines.openvino import OpenVinoEngine
from millrace.engines.transformers import TransformersEngine
from millrace.engines.upstream import Adapter, Upstream, UpstreamEngine, context_of
from millrace.errors import EngineError
from millrace.releases.manifest import Chain, Generator, HuggingFaceModel, ServedModel, Weights, describe_weights
from millrace.releases.package import EMBEDDING, MANIFEST
from millrace.settings import Settings


def upstream_of(settings: Settings) -> Upstream:
    return Upstream(settings.upstream_url, settings.upstream_api_key)


def declared_generator(settings: Settings, application: Application) -> tuple[Generator, Path]:
    """What new releases of `application` generate with, and the folder with its files: the model that the deployment's
    server has (`MILLRACE_UPSTREAM_MODEL`), else the declared package's weights, in a format that no engine rounds.

    Raises:
        EngineError: the package isn't installed, its file is broken, or the server doesn't answer or has no such model.
    """
    weights = base_model_path(application.generator)
    if settings.upstream_model:
        return served_model(settings), weights.parent
    weights = exact_file(weights, settings.cache)
    return describe_weights(weights), weights.parent


def served_model(settings: Settings) -> ServedModel:
    """`MILLRACE_UPSTREAM_MODEL` as it is. Raises as `declared_generator`."""
    name = settings.upstream_model
    return ServedModel(name=name, context_tokens=context_of(upstream_of(settings), name))


def adapter_name(generator: ServedModel) -> str:
    """What a server is told to call the adapter: the same wherever the release goes."""
    return f"millrace-{generator.identity[:16]}"


def open_engine(generator: Generator, folder: Path, *, upstream: Upstream, threads: int, cache_gb: int) -> Engine:
    """The engine of a release whose files are in `folder`.

    Raises:
        EngineError: the weights can't be loaded, the server doesn't answer, has no such model or can't load the
            adapter, or the chain isn't installed as the release has it.
    """
    if isinstance(generator, Weights):
        return OpenVinoEngine(folder / generator.name, cache_gb=cache_gb, threads=threads)
    if isinstance(generator, HuggingFaceModel):
        _require_only(folder, generator)
        return TransformersEngine(folder, threads=threads)
    if isinstance(generator, Chain):
        return open_chain(generator)
    adapter = Adapter(adapter_name(generator), folder) if generator.adapter else None
    return UpstreamEngine(upstream, generator.name, context_tokens=generator.context_tokens, adapter=adapter)


def open_chain(generator: Chain) -> LangChainEngine:
    """
    Raises:
        EngineError: the chain isn't installed as the release has it, or can't be made.
    """
    return LangChainEngine(
        generator.name,
        generator.package,
        generator.package_version,
        generator.parameters,
        context_tokens=generator.context_tokens,
    )


def _require_only(folder: Path, generator: HuggingFaceModel) -> None:
    """transformers reads what it finds: a file that somebody put beside the release's could be an adapter."""
    known = {file.name for file in generator.files} | {MANIFEST, EMBEDDING}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if strange:
        raise EngineError(f"{folder} holds {strange[0]}, which is no part of the release; remove it")
