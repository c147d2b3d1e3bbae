import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.applications import Generation
from millrace.errors import ReleaseError
from millrace.releases.manifest import (
    FORMAT,
    File,
    HuggingFaceModel,
    Manifest,
    PromptVersion,
    ServedModel,
    Weights,
    describe_adapter,
    describe_weights,
    read_manifest,
)
from millrace.releases.manifest import RetrievalLineage as Lineage

TEMPLATE = "{{ question }}"


def manifest(template: str = TEMPLATE, sha256: str = "0" * 64, tokens: int = 48) -> Manifest:
    return Manifest(
        application="qa",
        generator=Weights(name="model.gguf", sha256=sha256, bytes=4),
        prompt=PromptVersion(name="qa.prompt", version="1", template=template),
        retrieval=Lineage(lineage="minilm-1", embedding_model="minilm", chunks=2),
        generation=Generation(max_new_tokens=tokens),
        code_version="0.1.0",
    )


def test_the_id_never_changes_for_the_same_content() -> None:
    # Pinned: releases registered by earlier versions must keep their ids.
    assert manifest().release_id == "rel-62f98b40f01c89bf"


@given(st.text(), st.text())
def test_the_id_follows_the_content(one: str, other: str) -> None:
    assert (manifest(one).release_id == manifest(other).release_id) == (one == other)
    assert read_manifest(manifest(one).canonical(), "a test") == manifest(one)


def test_other_weights_or_another_generation_are_another_release() -> None:
    assert len({manifest().release_id, manifest(sha256="1" * 64).release_id, manifest(tokens=9).release_id}) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "nonsense"])
def test_what_is_not_a_manifest_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ReleaseError, match=r"^here is not a release manifest: .*; register the release again$"):
        read_manifest(text, "here")


def test_a_newer_format_is_refused() -> None:
    newer = json.loads(manifest().canonical()) | {"format": FORMAT + 1, "unknown": True}
    with pytest.raises(ReleaseError, match=f"has manifest format {FORMAT + 1}, this Millrace reads up to {FORMAT}"):
        read_manifest(json.dumps(newer), "here")


def test_a_model_that_a_server_has_needs_a_reader_of_format_2_and_weights_do_not() -> None:
    weights = manifest()
    served = weights.changed(generator=ServedModel(name="smol", context_tokens=8192))
    assert (weights.format, served.format, served.changed(generator=weights.generator).format) == (1, 2, 1)
    assert read_manifest(served.canonical(), "a test") == served
    assert served.generator.files == ()
    assert served.generator.identity != weights.generator.identity


def test_a_fine_tuned_embedding_model_needs_a_reader_of_format_4_and_is_its_files() -> None:
    weights = manifest()
    files = (File(name="model.safetensors", sha256="1" * 64, bytes=1),)
    tuned = weights.changed(retrieval=weights.retrieval.model_copy(update={"lineage": "tuned-1", "tuned": files}))
    assert (weights.format, tuned.format, tuned.changed(retrieval=weights.retrieval).format) == (1, 4, 1)
    assert read_manifest(tuned.canonical(), "a test") == tuned
    assert (weights.retrieval.tuned_sha256, tuned.retrieval.tuned_sha256) == (None, "1" * 64)
    assert "tuned" not in weights.canonical()


def test_a_hugging_face_directory_needs_a_reader_of_format_3_and_is_its_files() -> None:
    files = [
        File(name=name, sha256=digit * 64, bytes=1) for name, digit in (("config.json", "0"), ("m.safetensors", "1"))
    ]
    model = HuggingFaceModel(name="smol", files=tuple(files))
    whole = manifest().changed(generator=model)
    assert whole.format == 3
    assert read_manifest(whole.canonical(), "a test") == whole
    other = files[1].model_copy(update={"sha256": "2" * 64})
    assert HuggingFaceModel(name="smol", files=(files[0], other)).identity != model.identity
    assert HuggingFaceModel(name="renamed", files=model.files).identity == model.identity
    with pytest.raises(ValueError, match="should match pattern"):
        File(name="../config.json", sha256="0" * 64, bytes=1)


def test_an_adapter_is_described_by_its_two_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ReleaseError, match=r"adapter_model.safetensors is missing or empty; an adapter is adapter_config"
    ):
        describe_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("tensors")
    adapter = describe_adapter(tmp_path)
    plain = ServedModel(name="smol", context_tokens=8192)
    adapted = ServedModel(name="smol", context_tokens=8192, adapter=adapter)
    assert [file.bytes for file in adapted.files] == [2, 7]
    assert plain.identity != adapted.identity


def test_weights_are_described_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "w.gguf").write_bytes(b"abc")
    described = describe_weights(tmp_path / "w.gguf")
    assert (described.name, described.bytes) == ("w.gguf", 3)
    assert described.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    for missing in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ReleaseError, match="is not a file with weights"):
            describe_weights(missing)
