import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from millrace.applications import Generation
from millrace.engines.engine import Message
from millrace.errors import EngineError, ReleaseError, SettingsError
from millrace.policies import Prices
from millrace.releases.loader import ReleaseLoader
from millrace.releases.registry import register_release
from tests.releases.conftest import Answering, Make

pytestmark = pytest.mark.model


def test_releases_of_the_same_weights_share_an_engine_until_the_last_leaves(answering: Answering) -> None:
    loader = ReleaseLoader(answering.settings, answering.application)
    with ThreadPoolExecutor(4) as pool:
        versions = [answering.declared, answering.terse] * 2
        declared, terse, *again = pool.map(loader.load, versions)
    assert again == [declared, terse]
    assert declared.engine is terse.engine
    assert declared.release_id != terse.release_id
    loader.unload(answering.declared)
    loader.unload(answering.declared)
    assert terse.answer("What is the DAG folder?").text
    loader.unload(answering.terse)
    with pytest.raises(EngineError, match="is closed"):
        terse.answer("What is the DAG folder?")
    assert loader.load(answering.terse).answer("What is the DAG folder?").text
    loader.close()


def test_a_release_whose_generator_has_no_price_is_not_loaded(answering: Answering) -> None:
    named = Prices.model_validate({"models": {"gpt": {"prompt_million_tokens": 1, "completion_million_tokens": 1}}})
    unpriced = answering.application.model_copy(update={"prices": named})
    loader = ReleaseLoader(answering.settings, unpriced)
    with pytest.raises(SettingsError, match="has no price"):
        loader.load(answering.declared)
    loader.close()


def test_others_answer_while_a_release_is_loaded_and_one_that_can_not_be_loaded_leaves_no_trace(
    answering: Answering, make_release: Make
) -> None:
    loader = ReleaseLoader(answering.settings, answering.application)
    pipeline = loader.load(answering.declared)
    manifest, weights = make_release("these are no weights")
    manifest = manifest.model_copy(
        update={"application": answering.application.name, "retrieval": pipeline.manifest.retrieval}
    )
    broken = register_release(answering.settings, answering.application, manifest, weights.parent, run="test", tags={})
    failures: list[Exception] = []

    def load() -> None:
        for _ in range(3):
            try:
                loader.load(broken)
            except EngineError as error:
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert pipeline.engine.generate([Message("user", "Hi")], Generation(max_new_tokens=4)).completion_tokens
    for thread in threads:
        thread.join()
    assert len(failures) == 6
    assert all("is not a readable GGUF file" in str(error) for error in failures)
    with pytest.raises(ReleaseError, match="answering@999 is not registered"):
        loader.load("999")
    assert pipeline.answer("What is the DAG folder?").text
    loader.close()
