"""`millrace ask`: one question to the gateway, as any client would send it."""

from dataclasses import dataclass

import httpx

from millrace.errors import StackError
from millrace.settings import Settings


@dataclass(frozen=True)
class Told:
    """An answer for a person to read."""

    text: str
    citations: tuple[str, ...]
    about: str
    """Release, index build and tokens."""


def ask(settings: Settings, model: str, question: str, *, user: str) -> Told:
    """The gateway's answer to `question`.

    Raises:
        StackError: it does not answer, or refuses; its own sentence is in the message.
    """
    key = settings.api_key.get_secret_value()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = {"model": model, "user": user, "messages": [{"role": "user", "content": question}]}
    try:
        answered = httpx.post(
            f"{settings.gateway_url}/v1/chat/completions", json=request, headers=headers, timeout=120, trust_env=False
        )
    except httpx.HTTPError as error:
        raise StackError(
            f"the gateway at {settings.gateway_url} does not answer ({error}); `millrace up` starts it"
        ) from None
    body = answered.json()
    if answered.status_code == 401:
        raise StackError(
            f"the gateway refused: {body['error']['message']}; set MILLRACE_API_KEY to a key, which "
            "`millrace key create` makes"
        )
    if answered.is_error:
        raise StackError(f"the gateway refused: {body['error']['message']}")
    ours, usage = body["millrace"], body["usage"]
    return Told(
        text=body["choices"][0]["message"]["content"],
        citations=tuple(f"{c['title']}  {c['uri']}" for c in ours["citations"]),
        about=(
            f"release {ours['release_version']} ({ours['release_id']}), index build {ours['index_build']}, "
            f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
        ),
    )
