"""A chain as Millrace releases it: a factory that gets the release's parameters and gives a Runnable.

Its last step gives text; `max_new_tokens` and `temperature` are configurable, so that a release says how to generate.
"""

from typing import Any

from langchain_core.messages import BaseMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField, Runnable, RunnableLambda
from langchain_openai import ChatOpenAI


def concise(parameters: dict[str, Any]) -> Runnable[Any, str]:
    """An instruction before the messages, a chat model, its text.

    Args:
        parameters: `model`, what the server of `OPENAI_BASE_URL` calls it; `instruction`.
    """
    # `streaming` by name: configurable fields make the model again with every field given, and one whose default
    # `streaming=False` was given answers a stream in one piece.
    model = ChatOpenAI(model=parameters["model"], streaming=True, stream_usage=True).configurable_fields(
        max_tokens=ConfigurableField(id="max_new_tokens"),
        temperature=ConfigurableField(id="temperature"),
    )

    def instructed(messages: list[BaseMessage]) -> list[BaseMessage]:
        return [SystemMessage(parameters["instruction"]), *messages]

    return RunnableLambda(instructed) | model | StrOutputParser()
