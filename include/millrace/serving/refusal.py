"""What a caller gets instead of an answer: a status, one sentence, and OpenAI's error JSON around it."""

from typing import Any

from millrace.errors import ServingError

QUOTA = "insufficient_quota"
"""Code, and type, of a refusal for a spent budget."""


class Refusal(ServingError):
    """A request that is answered with `status` and this sentence. `code` is for programs, `param` names the field."""

    def __init__(
        self, status: int, sentence: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after
        """Seconds, where trying again may help."""

    def body(self) -> dict[str, Any]:
        """As OpenAI's API says it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.code == QUOTA:
            kind = QUOTA
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.code == QUOTA:
            # OpenAI's clients would try a 429 again.
            headers["X-Should-Retry"] = "false"
        return headers


def unavailable(sentence: str, *, code: str = "unavailable", retry_after: int = 2) -> Refusal:
    """Nothing is wrong with the request; this deployment can't answer it now."""
    return Refusal(503, sentence, code=code, retry_after=retry_after)
