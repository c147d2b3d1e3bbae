"""What must be installed to load a release: distributions and their versions, as they are here.

A release of one kind doesn't need the engines of the others. Knows no registry; a test loads each kind and compares.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, version

from millrace.errors import ReleaseError
from millrace.releases.manifest import Chain, Generator, HuggingFaceModel, Manifest, Part, ServedModel, Weights

_EVERY = (
    "mlflow", "pandas", "numpy", "pyarrow", "deltalake", "pydantic", "pydantic-settings", "jinja2", "gguf",
    "qdrant-edge-py", "qdrant-client",
    "tokenizers", "openvino", "torch", "transformers", "safetensors",  # the embedding model, converted once
)  # fmt: skip
_KINDS: dict[type[Part], tuple[str, ...]] = {
    Weights: ("openvino-genai",),
    ServedModel: ("openai", "httpx2"),
    HuggingFaceModel: (),
    Chain: ("langchain-core",),
}


def requirements(manifest: Manifest) -> list[str]:
    """`name==version` of Millrace and of what it imports to load this release.

    Raises:
        ReleaseError: one of them isn't installed here.
    """
    millrace, *others = required(manifest)
    return [f"{millrace}=={version(millrace)}", *sorted(f"{name}=={_version(name)}" for name in others)]


def required(manifest: Manifest) -> tuple[str, ...]:
    """Names of Millrace and of what it imports to load this release."""
    return ("millrace", *_EVERY, *_kind(manifest.generator), manifest.retrieval.embedding_model)


def is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def locked(manifest: Manifest) -> list[str]:
    """`requirements` without Millrace, with all that they require in turn: to be installed without resolving.

    The embedding model's package is data; what it requires is of no use here.

    Raises:
        ReleaseError: one of them isn't installed here.
    """
    data = manifest.retrieval.embedding_model
    found = {data: _version(data)} | _closure((*_EVERY, *_kind(manifest.generator)))
    return sorted(f"{name}=={version}" for name, version in found.items())


def _kind(generator: Generator) -> tuple[str, ...]:
    brought = (generator.package,) if isinstance(generator, Chain) else ()
    return (*_KINDS[type(generator)], *brought)


def _closure(names: Iterable[str]) -> dict[str, str]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        found[name] = _version(name)
        for extra in {"", *wanted.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            for line in distribution(name).requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise ReleaseError(
            f"package {name}, which the release needs, is not installed here; pip install {name}"
        ) from None
