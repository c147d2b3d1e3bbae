"""A server that speaks OpenAI's chat completions, asks for a key, and says a wrong one back, as some proxies do."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class KeyedUpstream(ThreadingHTTPServer):
    """Answers whoever shows one of `keys`; `shown` holds those that it has seen."""

    daemon_threads = True

    def __init__(self, *keys: str) -> None:
        self.keys = set(keys)
        self.shown: set[str] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: KeyedUpstream

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "m", "object": "model"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith("/chat/completions"):
            return self._say(404, {"error": {"message": "no such thing"}})
        words = {"role": "assistant", "content": "an answer"}
        about = {"id": "x", "created": 0, "model": "m"}
        if not json.loads(body).get("stream"):
            choice = {"index": 0, "message": words, "finish_reason": "stop"}
            return self._answer(about | {"object": "chat.completion", "choices": [choice]})
        choice = {"index": 0, "delta": words, "finish_reason": "stop"}
        chunk = json.dumps(about | {"object": "chat.completion.chunk", "choices": [choice]})
        return self._answer(f"data: {chunk}\n\ndata: [DONE]\n\n")

    def _answer(self, what: dict[str, Any] | str) -> None:
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.shown.add(key)
        if key not in self.server.keys:
            said = f"Incorrect API key provided: {key}"
            return self._say(
                401, {"error": {"message": said, "type": "invalid_request_error", "code": "invalid_api_key"}}
            )
        return self._say(200, what)

    def _say(self, status: int, what: dict[str, Any] | str) -> None:
        text = what if isinstance(what, str) else json.dumps(what)
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if isinstance(what, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass
