import pytest

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.releases.declare import declare_release
from millrace.releases.published_split import publish_split
from millrace.releases.registry import fetch_release, register_release, release_manifest, versions
from millrace.releases.split import Split
from millrace.retrieval.embed import lineage_id
from millrace.settings import Settings
from tests.releases.conftest import Answering, Make


def test_the_declaration_is_registered_once_with_everything_it_says(answering: Answering) -> None:
    settings, application = answering.settings, answering.application
    again = declare_release(settings, application, variant="declared", run="test")
    assert again["version"] == answering.declared
    assert not again["changed"]
    manifest = release_manifest(settings, application, answering.declared)
    assert manifest.release_id == again["release_id"]
    assert manifest.prompt.template == application.prompt.template
    assert manifest.retrieval.lineage == lineage_id(application)
    assert manifest.generation == application.generation
    assert manifest.generator.name == "SmolLM2-135M-Instruct.Q8_0.gguf"
    assert fetch_release(settings, application, answering.declared).name == manifest.release_id


def test_a_variant_is_another_release_with_the_same_weights(answering: Answering) -> None:
    settings, application = answering.settings, answering.application
    terse = release_manifest(settings, application, answering.terse)
    declared = release_manifest(settings, application, answering.declared)
    assert terse.prompt.template == application.prompt.variants["terse"]
    assert terse.generator == declared.generator
    assert versions(settings, application)[answering.terse]["millrace.variant"] == "terse"


def test_an_unknown_variant_is_answered_with_those_that_are_declared(answering: Answering) -> None:
    with pytest.raises(ReleaseError, match="variant 'loud' is not declared; declared are declared, terse"):
        declare_release(answering.settings, answering.application, variant="loud", run="test")


def test_a_variant_of_the_champion_has_its_weights_and_says_what_they_were_trained_on(
    registry: Settings, application: Application, make_release: Make
) -> None:
    champion, weights = make_release("trained weights")
    tags = {"training_set": "train-1", "simulated": "true", "fingerprint": "of the training alone"}
    version = register_release(registry, application, champion, weights.parent, run="test", tags=tags)
    publish_split(registry, application.name, Split(sequence=0, champion=version))

    declared = declare_release(registry, application, variant="terse", run="test by ann")

    manifest = release_manifest(registry, application, declared["version"])
    found = versions(registry, application)[declared["version"]]
    assert declared["changed"]
    assert manifest.generator == champion.generator
    assert manifest.prompt.template == application.prompt.variants["terse"]
    assert (found["training_set"], found["simulated"]) == ("train-1", "true")
    assert "fingerprint" not in found
    assert found["millrace.built_by"] == "ann"
    assert not declare_release(registry, application, variant="terse", run="test")["changed"]
