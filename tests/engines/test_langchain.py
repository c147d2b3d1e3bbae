"""The example's chain over a real server, found by its real entry point."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from millrace.applications import Generation
from millrace.engines.engine import Message
from millrace.engines.langchain import LangChainEngine, _watcher, installed_chain
from millrace.errors import EngineError
from tests.conftest import free_port
from tests.engines.chains import PACKAGE, install
from tests.engines.servers import Served

pytestmark = [pytest.mark.model, pytest.mark.xdist_group("mlflow")]  # as in test_upstream.py

CAPITAL = [Message("user", "What is the capital of France?")]
COUNT = [Message("user", "Count from one to one thousand.")]

OTHERS = '''
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda
from example_chain import concise


def loud(parameters):
    """Whatever is asked, in capitals: it ignores how long an answer may be."""
    return RunnableLambda(lambda messages: messages[-1].content.upper())


def listing(parameters):
    return concise(parameters | {"instruction": "none"}) | RunnableLambda(lambda text: [text])


def nothing(parameters):
    return parameters
'''


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example, with entry points that are each wrong in one way."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "other_chains.py").write_text(OTHERS)
    names = ("loud", "listing", "nothing", "missing")
    install(folder, **{name: f"other_chains:{name}" for name in names})
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def made(packages: None, model_server: Served, monkeypatch: pytest.MonkeyPatch) -> LangChainEngine:
    monkeypatch.setenv("OPENAI_BASE_URL", model_server.upstream.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return a_chain("concise", model_server.model)


def a_chain(name: str, model: str = "any", version: str = "1.0.0") -> LangChainEngine:
    parameters = {"model": model, "instruction": "You are a helpful assistant."}
    return LangChainEngine(name, PACKAGE, version, parameters, context_tokens=2048)


def test_a_known_fact_is_answered_and_what_its_model_used_is_counted(made: LangChainEngine) -> None:
    answer = made.generate(CAPITAL, Generation(max_new_tokens=32))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert 15 < answer.prompt_tokens < 60
    assert 0 < answer.completion_tokens <= 32
    assert answer == made.generate(CAPITAL, Generation(max_new_tokens=32))


def test_the_release_says_how_long_an_answer_may_be(made: LangChainEngine) -> None:
    answer = made.generate(COUNT, Generation(max_new_tokens=3))
    assert (answer.completion_tokens, answer.finish_reason) == (3, "length")


def test_streamed_pieces_are_the_whole_text_and_are_counted_too(made: LangChainEngine) -> None:
    stream = made.stream(CAPITAL, Generation(max_new_tokens=32))
    with pytest.raises(EngineError, match="still running"):
        _ = stream.result
    pieces = list(stream)
    assert len(pieces) > 2
    assert "".join(pieces) == stream.result.text
    assert stream.result == made.generate(CAPITAL, Generation(max_new_tokens=32))


@pytest.mark.long
def test_closing_a_stream_hangs_up_and_leaves_the_chain_usable(made: LangChainEngine) -> None:
    stream = made.stream(COUNT, Generation(max_new_tokens=200))
    first = next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == first
    reader = made.stream(COUNT, Generation(max_new_tokens=200))
    threading.Timer(0.5, reader.close).start()
    list(reader)
    assert reader.result.finish_reason == "cancelled"
    assert made.generate(CAPITAL, Generation(max_new_tokens=4)).text


def test_a_closed_engine_says_so(made: LangChainEngine) -> None:
    made.close()
    for ask in (made.generate, made.stream):
        with pytest.raises(EngineError, match="engine of concise is closed; load the release again"):
            ask(CAPITAL, Generation())


def test_what_can_not_be_used_as_the_release_has_it_is_refused_by_name(
    packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for name, version, said in (
        (
            "concise",
            "2.0.0",
            r"must be that of millrace-example-chain==2\.0\.0, here it is .*==1\.0\.0",
        ),
        ("absent", "1.0.0", r"'absent' is not installed here: .*group millrace\.chains \(there are: concise, listing"),
        ("loud", "1.0.0", "has no configurable field max_new_tokens nor temperature, so what a release says"),
        ("nothing", "1.0.0", "other_chains:nothing gave dict, not a Runnable"),
        ("missing", "1.0.0", "'missing' failed: AttributeError"),
    ):
        with pytest.raises(EngineError, match=said) as refused:
            a_chain(name, version=version)
        assert "\n" not in str(refused.value)
    with pytest.raises(EngineError, match="'concise' failed: KeyError: 'model'"):
        LangChainEngine("concise", PACKAGE, "1.0.0", {}, context_tokens=2048)


def test_two_packages_with_one_name_are_refused(
    packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other := install(tmp_path) / "millrace_example_chain-1.0.0.dist-info").joinpath("METADATA").write_text(
        "Metadata-Version: 2.4\nName: another-chain\nVersion: 1.0.0\n"
    )
    other.rename(tmp_path / "another_chain-1.0.0.dist-info")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match="is brought by another-chain and millrace-example-chain; uninstall all but"):
        installed_chain("concise")


def test_a_last_step_that_gives_no_text_is_said(model_server: Served, made: LangChainEngine) -> None:
    with pytest.raises(EngineError, match="the chain gave list; its last step must give text or a message"):
        a_chain("listing", model_server.model).generate(CAPITAL, Generation(max_new_tokens=2))


def test_a_server_that_is_gone_is_one_sentence(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free_port()}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(EngineError, match="chain 'concise' failed: OpenAIConnectionError: Connection error"):
        a_chain("concise").generate(CAPITAL, Generation(max_new_tokens=2))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"finish_reason": "length"}, "length"),
        ({"finish_reason": "MAX_TOKENS"}, "length"),
        ({"finish_reason": "content_filter"}, "length"),
        ({"stop_reason": "max_tokens"}, "length"),
        ({"stop_reason": "end_turn"}, "stop"),
        ({"finish_reason": "STOP"}, "stop"),
        ({"finish_reason": "abort"}, "length"),
        ({"stopReason": "guardrail_intervened"}, "length"),
        ({"finish_reason": "PROHIBITED_CONTENT"}, "length"),
        ({"done_reason": "length"}, "length"),
        ({"finish_reason": None, "stopReason": "max_tokens"}, "length"),
        ({}, "stop"),
    ],
)
def test_an_answer_cut_short_is_known_for_one_whatever_the_integration_calls_it(said: dict, reason: str) -> None:
    watcher = _watcher()
    message = AIMessage("In the", response_metadata=said)
    watcher.on_llm_end(LLMResult(generations=[[ChatGeneration(message=message)]]))
    assert watcher.reason == reason
