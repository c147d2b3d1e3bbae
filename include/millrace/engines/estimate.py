"""Tokens of a text where nobody can count them: rather too many, so that what is estimated to fit does fit."""

from collections.abc import Sequence

from millrace.engines.engine import Message

_BYTES_A_TOKEN = 3
"""Fewer than tokenizers get out of most languages' text, so that an estimate is rather too high."""
_TURN_TOKENS = 8
_TEMPLATE_TOKENS = 32
"""For what a chat template says of its own."""


def estimated_tokens(text: str) -> int:
    return -(-len(text.encode()) // _BYTES_A_TOKEN)


def estimated_prompt(messages: Sequence[Message]) -> int:
    return sum(estimated_tokens(message.content) + _TURN_TOKENS for message in messages) + _TEMPLATE_TOKENS
