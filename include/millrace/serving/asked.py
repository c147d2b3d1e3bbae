"""A request as it came, turned into what it asks, or refused: nothing that would change an answer is ignored.

A release fixes prompt and generation, so that its answers can be compared and repeated; a caller who asks for
another temperature, tools or several choices gets a sentence instead of something else. Of the messages the last
one is the question; earlier turns of user and assistant are let through, but every question is answered by itself.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from millrace.lakehouse.quality import LONGEST_REMARK
from millrace.releases.pipeline import MAX_QUESTION
from millrace.serving.refusal import Refusal
from millrace.sources.event_log import now
from millrace.sources.pseudonym import pseudonym

MAX_BODY = 1 << 20
"""Bytes of a request."""
LONGEST_NAME = 256
"""Characters of a user or a model."""

_READ = {"model", "messages", "stream", "stream_options", "user"}
_NO_EFFECT = {"metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "logprobs": (False,),
    "store": (False,),
    "stop": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
}
"""Fields of OpenAI's API and the values that ask for nothing special; null is always one."""


@dataclass(frozen=True)
class Asked:
    """One question to one application."""

    model: str
    """As the caller wrote it: `qa`, `qa@champion`, `qa@12`."""
    application: str
    pin: str | None
    """`champion`, `challenger` or a version; None: the split decides."""
    question: str
    user: str
    """Keyed pseudonym."""
    simulated: bool
    stream: bool
    include_usage: bool
    at: datetime = field(default_factory=now)
    """When it arrived."""
    started: float = field(default_factory=time.perf_counter)
    """The same, to measure from."""


@dataclass(frozen=True)
class Said:
    """Feedback on one answer. `rating` is between 0 and 1."""

    completion_id: str
    rating: float
    comment: str | None
    correction: str | None
    user: str | None
    simulated: bool


def read_asked(body: bytes, headers: Mapping[str, str], key: bytes) -> Asked:
    """The question in a chat completion request; `key` makes the pseudonym.

    A request without `user` and without the header `X-Millrace-User` is a user of its own, who never comes back.

    Raises:
        Refusal: 400, with the field that can't be honoured.
    """
    fields = _object(body, 400)
    for name, value in fields.items():
        if value is None or name in _READ or name in _NO_EFFECT or value in _NEUTRAL.get(name, ()):
            continue
        raise _invalid(
            f"{name} can't be set to {_short(value)}: a release fixes how it answers; leave the field out", name
        )
    model = _text(fields.get("model"), "model", LONGEST_NAME)
    application, _, pin = model.partition("@")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _invalid("stream_options must be an object", "stream_options")
    user = _user(fields.get("user"), headers) or f"anonymous:{uuid.uuid4()}"
    return Asked(
        model=model,
        application=application,
        pin=pin or None,
        question=_question(fields.get("messages")),
        user=pseudonym(key, user),
        simulated=_simulated(headers),
        stream=_flag(fields.get("stream"), "stream"),
        include_usage=_flag(options.get("include_usage"), "stream_options.include_usage"),
    )


def read_said(body: bytes, headers: Mapping[str, str], key: bytes) -> Said:
    """The feedback in a request.

    Raises:
        Refusal: 422, with the field that is missing or out of range.
    """
    fields = _object(body, 422)
    if unknown := sorted(fields.keys() - {"completion_id", "rating", "comment", "correction", "user"}):
        raise _unfit(f"feedback has no field {unknown[0]!r}; it has completion_id, rating, comment, correction")
    completion_id, rating = fields.get("completion_id"), fields.get("rating")
    if not isinstance(completion_id, str):
        raise _unfit("completion_id is missing; send the id of the answer that is rated", "completion_id")
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not 0 <= rating <= 1:
        raise _unfit(f"rating {_short(rating)} is not a number between 0 and 1", "rating")
    for name in ("comment", "correction"):
        remark = fields.get(name)
        if remark is not None and (not isinstance(remark, str) or len(remark) > LONGEST_REMARK):
            raise _unfit(f"{name} must be a text of at most {LONGEST_REMARK} characters", name)
    user = _user(fields.get("user"), headers)
    return Said(
        completion_id=completion_id,
        rating=float(rating),
        comment=fields.get("comment"),
        correction=fields.get("correction"),
        user=pseudonym(key, user) if user else None,
        simulated=_simulated(headers),
    )


def _object(body: bytes, status: int) -> dict[str, Any]:
    try:
        found = from_json(body, allow_inf_nan=True)
    except ValueError as error:
        raise Refusal(status, f"the request is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refusal(status, "the request is not a JSON object", code="invalid_json")
    return found


def _question(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise _invalid("messages must be a list that ends with the user's question", "messages")
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    for number, role in enumerate(roles):
        if role not in ("user", "assistant"):
            raise _invalid(
                f"message {number} has the role {_short(role)}: a release brings its own instructions, "
                "only user and assistant can speak",
                f"messages[{number}].role",
            )
    if roles[-1] != "user":
        raise _invalid("the last message must be the user's question", "messages")
    question = _content(messages[-1].get("content"), f"messages[{len(messages) - 1}].content").strip()
    if not question:
        raise _invalid("the question is empty; ask something", "messages")
    if len(question) > MAX_QUESTION:
        raise Refusal(
            400,
            f"the question has {len(question)} characters, at most {MAX_QUESTION} are read; shorten it",
            code="context_length_exceeded",
            param="messages",
        )
    return question


def _content(content: Any, param: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise _invalid("content must be text, or a list of text parts", param)
    return "".join(map(str, texts))


def _user(field: Any, headers: Mapping[str, str]) -> str | None:
    header = headers.get("x-millrace-user")
    named = _text(field, "user", LONGEST_NAME) if field is not None else None
    if header and named and header != named:
        raise _invalid("the field user and the header X-Millrace-User name two users; send one", "user")
    return named or header or None


def _simulated(headers: Mapping[str, str]) -> bool:
    value = headers.get("x-millrace-simulated", "false").lower()
    if value not in ("true", "false"):
        raise _invalid(f"the header X-Millrace-Simulated is {_short(value)}; it is true or false", "simulated")
    return value == "true"


def _text(value: Any, name: str, longest: int) -> str:
    if not isinstance(value, str) or not value or len(value) > longest:
        raise _invalid(f"{name} must be a text of 1 to {longest} characters, got {_short(value)}", name)
    return value


def _flag(value: Any, name: str) -> bool:
    if value not in (None, True, False):
        raise _invalid(f"{name} must be true or false, got {_short(value)}", name)
    return bool(value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


def _invalid(sentence: str, param: str) -> Refusal:
    return Refusal(400, sentence, code="invalid_value", param=param)


def _unfit(sentence: str, param: str | None = None) -> Refusal:
    return Refusal(422, sentence, code="invalid_feedback", param=param)
