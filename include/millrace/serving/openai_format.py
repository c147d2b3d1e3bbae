"""An exchange in the words of OpenAI's API, so that its official clients work unmodified.

What they don't know (release, index build, citations) is in the extra field `millrace`, which they hand through.
"""

import json
from typing import Any

from millrace.serving.asked import Asked
from millrace.serving.exchange import Answered, Begun
from millrace.serving.refusal import Refusal

DONE = b"data: [DONE]\n\n"


def completion(asked: Asked, begun: Begun, answered: Answered) -> dict[str, Any]:
    """The body of an answer that isn't streamed."""
    message = {"role": "assistant", "content": answered.answer.text, "refusal": None}
    return {
        "id": begun.completion_id,
        "object": "chat.completion",
        "created": int(begun.at.timestamp()),
        "model": asked.model,
        "system_fingerprint": fingerprint(answered),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answered.answer.finish_reason}],
        "usage": usage(answered),
        "millrace": extra(asked, answered),
    }


def opening(asked: Asked, begun: Begun) -> bytes:
    """The first event of a stream."""
    return _event(_chunk(asked, begun, {"role": "assistant", "content": ""}, None))


def words(asked: Asked, begun: Begun, text: str) -> bytes:
    return _event(_chunk(asked, begun, {"content": text}, None))


def closing(asked: Asked, begun: Begun, answered: Answered) -> bytes:
    """The last chunk, with all that is known only now; then the end. The usage is told once, since clients add up what
    chunks say: in a chunk of its own if it was asked for, as OpenAI does it, else in the last one."""
    known = {"system_fingerprint": fingerprint(answered), "millrace": extra(asked, answered)}
    used = {"usage": usage(answered)}
    last = _chunk(asked, begun, {}, answered.answer.finish_reason) | known
    if not asked.include_usage:
        return _event(last | used) + DONE
    return _event(last) + _event(_chunk(asked, begun, {}, None) | known | used | {"choices": []}) + DONE


def broken(refusal: Refusal) -> bytes:
    """The end of a stream that can't be continued: an error instead of a last chunk, and no `[DONE]`."""
    return _event(refusal.body())


def fingerprint(answered: Answered) -> str:
    return f"{answered.answer.release_id}:{answered.answer.index_build}"


def usage(answered: Answered) -> dict[str, Any]:
    """Tokens of the answer, also where it came from the cache."""
    found = answered.answer.usage
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
    }


def extra(asked: Asked, answered: Answered) -> dict[str, Any]:
    answer = answered.answer
    return {
        "application": asked.application,
        "release_id": answer.release_id,
        "release_version": answered.release_version,
        "index_build": answer.index_build,
        "arm": answered.arm,
        "citations": [{"chunk_id": hit.chunk_id, "title": hit.title, "uri": hit.uri} for hit in answer.citations],
        "from_cache": answered.from_cache,
        "fell_back": answered.fell_back,
    }


def _chunk(asked: Asked, begun: Begun, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {
        "id": begun.completion_id,
        "object": "chat.completion.chunk",
        "created": int(begun.at.timestamp()),
        "model": asked.model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
