"""What a release is: data that, with a package version and an index build, fixes every answer.

Its id is the hash of the manifest, which holds the hash of the weights; so it is the same wherever the release
goes. This module knows no registry and loads no model.
"""

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from millrace.applications import Application, Generation
from millrace.engines.huggingface import model_files
from millrace.errors import ReleaseError
from millrace.retrieval.embedding_model import MODEL_FILES, WEIGHTS

FORMAT = 4
"""1: the generator is a GGUF file. 2: it may be a model that a server has. 3: a Hugging Face directory or an installed
chain. 4: the embedding model may be a fine-tuned one. A manifest says the lowest that reads it."""


RELEASE_ID = re.compile(r"rel-[0-9a-f]{16}")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(Part):
    """A file of the release, by content."""

    name: str = Field(pattern=r"^[^/\\]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)


class Weights(File):
    """A generator that this process computes. `kind` is the file's format, which says what engine reads it."""

    kind: Literal["gguf"] = "gguf"

    @property
    def files(self) -> tuple[File, ...]:
        return (self,)

    @property
    def identity(self) -> str:
        """Equal where the same bytes generate."""
        return self.sha256


class ServedModel(Part):
    """A generator that an OpenAI-compatible server computes; which server is the deployment's choice."""

    kind: Literal["openai"] = "openai"
    name: str
    """What the server calls the model."""
    context_tokens: int = Field(ge=1)
    adapter: tuple[File, ...] = ()
    """A LoRA adapter as peft saves it, which the server loads while it runs; empty: the model as it is."""

    @property
    def files(self) -> tuple[File, ...]:
        return self.adapter

    @property
    def identity(self) -> str:
        """Equal where the same model with the same adapter and context generates."""
        return _hash([self.name, self.context_tokens, *(file.sha256 for file in self.adapter)])


class HuggingFaceModel(Part):
    """A generator that this process computes with `transformers`: a directory as `save_pretrained` writes it."""

    kind: Literal["huggingface"] = "huggingface"
    name: str = Field(min_length=1)
    """What people call it, and prices and tables by that."""
    files: tuple[File, ...] = Field(min_length=1)

    @property
    def identity(self) -> str:
        """Equal where the same files generate."""
        return _hash([[file.name, file.sha256] for file in self.files])


class Chain(Part):
    """A generator that an installed package brings, a LangChain chain; the release holds what it is made with."""

    kind: Literal["langchain"] = "langchain"
    name: str
    """Of its entry point, in group `millrace.chains`."""
    package: str
    package_version: str
    parameters: dict[str, JsonValue] = {}
    """What its factory is given. No secrets: whoever may read the registry reads them."""
    context_tokens: int = Field(ge=1)

    @property
    def files(self) -> tuple[File, ...]:
        return ()

    @property
    def identity(self) -> str:
        """Equal where the same code with the same parameters generates."""
        made = json.dumps(self.parameters, sort_keys=True)
        return _hash([self.name, self.package, self.package_version, made, self.context_tokens])


Generator = Annotated[Weights | ServedModel | HuggingFaceModel | Chain, Field(discriminator="kind")]

_FORMATS: dict[type[Part], int] = {Weights: 1, ServedModel: 2, HuggingFaceModel: 3, Chain: 3}
"""Kind of generator → the lowest format that reads it."""


class PromptVersion(Part):
    """A version in the prompt registry, with its text: answering needs no registry."""

    name: str
    version: str
    template: str


class RetrievalLineage(Part):
    """How chunks were cut and embedded, and how many go into the prompt."""

    lineage: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")
    """Also the name of a folder."""
    embedding_model: str
    """Package of the embedding model."""
    chunks: int = Field(ge=1)
    tuned: tuple[File, ...] = Field(default=(), exclude_if=lambda files: not files)
    """The embedding model that was fine-tuned from the package's; empty: it is the package's."""

    @property
    def tuned_sha256(self) -> str | None:
        """Of the fine-tuned weights; None: it is the package's model."""
        return next((file.sha256 for file in self.tuned if file.name == WEIGHTS), None)


def _lowest_format(known: dict[str, Any]) -> int:
    retrieval = known.get("retrieval")
    if isinstance(retrieval, RetrievalLineage) and retrieval.tuned:
        return 4
    generator: Any = known.get("generator")
    return _FORMATS.get(type(generator), FORMAT)


class Manifest(Part):
    """Everything that distinguishes a release from another."""

    application: str
    generator: Generator
    prompt: PromptVersion
    retrieval: RetrievalLineage
    generation: Generation
    format: int = Field(default_factory=_lowest_format, ge=1)
    code_version: str = Field(default_factory=lambda: version("millrace"))

    @property
    def release_id(self) -> str:
        """`rel-` and 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return f"rel-{hashlib.sha256(self.canonical().encode()).hexdigest()[:16]}"

    def changed(self, **parts: Any) -> "Manifest":
        """This release with other `parts`, made by this code."""
        kept = {name: value for name, value in self if name not in ("format", "code_version")}
        return Manifest(**kept | parts)

    def canonical(self) -> str:
        """JSON with sorted keys and no white space: equal manifests are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def read_manifest(text: str, origin: str) -> Manifest:
    """The manifest in `text`; `origin` names it in errors.

    Raises:
        ReleaseError: it isn't a manifest, or one of a newer format.
    """
    try:
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("format"), int) and found["format"] > FORMAT:
            raise ReleaseError(
                f"{origin} has manifest format {found['format']}, this Millrace reads up to {FORMAT}; upgrade it"
            )
        return Manifest.model_validate(found)
    except (ValueError, ValidationError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else error
        raise ReleaseError(f"{origin} is not a release manifest: {reason}; register the release again") from None


def describe_weights(weights: Path) -> Weights:
    """The generator part for the file `weights`; reads it once.

    Raises:
        ReleaseError: it isn't a file, or is empty.
    """
    if not weights.is_file() or not weights.stat().st_size:
        raise ReleaseError(f"{weights} is not a file with weights; a release needs one .gguf file")
    return Weights(**_described(weights))


def describe_adapter(folder: Path) -> tuple[File, ...]:
    """The files of the LoRA adapter that peft saved in `folder`; reads them once.

    Raises:
        ReleaseError: one is missing or empty.
    """
    files = [folder / name for name in ADAPTER_FILES]
    for file in files:
        if not file.is_file() or not file.stat().st_size:
            raise ReleaseError(f"{file} is missing or empty; an adapter is {' and '.join(ADAPTER_FILES)}")
    return tuple(File(**_described(file)) for file in files)


def describe_embedding(folder: Path) -> tuple[File, ...]:
    """The files of the fine-tuned embedding model in `folder`; reads them once.

    Raises:
        ReleaseError: one is missing or empty.
    """
    files = [folder / name for name in MODEL_FILES]
    for file in files:
        if not file.is_file() or not file.stat().st_size:
            raise ReleaseError(f"{file} is missing or empty; an embedding model is {', '.join(MODEL_FILES)}")
    return tuple(File(**_described(file)) for file in files)


def describe_huggingface(folder: Path, name: str) -> HuggingFaceModel:
    """The generator part for the Hugging Face directory `folder`; reads its files once.

    Raises:
        EngineError: as `engines.huggingface.model_files`.
    """
    return HuggingFaceModel(name=name, files=tuple(File(**_described(file)) for file in model_files(folder)))


def declared_manifest(application: Application, generator: Generator, prompt: PromptVersion, lineage: str) -> Manifest:
    """The release that `application` declares, with this generator, prompt and retrieval lineage."""
    return Manifest(
        application=application.name,
        generator=generator,
        prompt=prompt,
        retrieval=RetrievalLineage(
            lineage=lineage,
            embedding_model=application.retrieval.embedding_model,
            chunks=application.retrieval.chunks,
        ),
        generation=application.generation,
    )


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _described(file: Path) -> dict[str, Any]:
    return {"name": file.name, "sha256": file_sha256(file), "bytes": file.stat().st_size}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
