"""How messages become the one string that SmolLM2-Instruct was trained on; training and serving both use it.

The same text as `tokenizer.apply_chat_template` of the model gives (a test compares them), except that control
tokens inside a message's content are spelled apart: a document or a question can't end its own turn.
"""

import re
from collections.abc import Sequence

from millrace.engines.engine import Message

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model's own template says where no system message does."""

END_OF_TURN = "<|im_end|>"

_CONTROL = re.compile(r"<\|(im_start|im_end|endoftext)\|>")


def chat_prompt(messages: Sequence[Message], *, answer: bool = True) -> str:
    """The prompt for `messages`; with `answer`, open for the assistant's turn."""
    turns = list(messages)
    if not turns or turns[0].role != "system":
        turns.insert(0, Message("system", DEFAULT_SYSTEM))
    text = "".join(f"<|im_start|>{turn.role}\n{plain(turn.content)}{END_OF_TURN}\n" for turn in turns)
    return text + ("<|im_start|>assistant\n" if answer else "")


def plain(content: str) -> str:
    """`content` with the control tokens of ChatML spelled apart."""
    return _CONTROL.sub(r"<| \1 |>", content)
