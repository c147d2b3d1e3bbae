"""What a release is: data that, with a package version and an index build, fixes every answer.

Its id is the hash of the manifest, which holds the hash of the weights; so it is the same wherever the release
goes. This module knows no registry and loads no model.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millrace.applications import Application, Generation
from millrace.errors import ReleaseError

FORMAT = 1


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Generator(Part):
    """The weights, by content. `kind` is their file format, which says what engine reads them."""

    kind: Literal["gguf"] = "gguf"
    name: str
    """File name."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)


class PromptVersion(Part):
    """A version in the prompt registry, with its text: answering needs no registry."""

    name: str
    version: str
    template: str


class RetrievalLineage(Part):
    """How chunks were cut and embedded, and how many go into the prompt."""

    lineage: str
    embedding_model: str
    chunks: int = Field(ge=1)


class Manifest(Part):
    """Everything that distinguishes a release from another."""

    format: int = Field(default=FORMAT, ge=1)
    application: str
    generator: Generator
    prompt: PromptVersion
    retrieval: RetrievalLineage
    generation: Generation
    code_version: str = Field(default_factory=lambda: version("millrace"))

    @property
    def release_id(self) -> str:
        """`rel-` and 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return f"rel-{hashlib.sha256(self.canonical().encode()).hexdigest()[:16]}"

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


def describe_weights(weights: Path) -> Generator:
    """The generator part for the file `weights`; reads it once.

    Raises:
        ReleaseError: it isn't a file, or is empty.
    """
    if not weights.is_file() or not weights.stat().st_size:
        raise ReleaseError(f"{weights} is not a file with weights; a release needs one .gguf file")
    return Generator(name=weights.name, sha256=file_sha256(weights), bytes=weights.stat().st_size)


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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
