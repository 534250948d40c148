"""A server for tests of the page: it serves the page's files, and answers as it was planned to."""

import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import qwenvl_lit

FILES = Path(qwenvl_lit.__file__).parent / "serving" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".png": "image/png"}


@dataclass(frozen=True)
class Answer:
    """An answer that is streamed, or an error.

    Args:
        objects: sent with the last chunk, if there are any.
        ending: "stop" or "length"; "lost" closes the connection without one; "error" sends an error
            in the stream; "never" goes on until the client leaves.
        status: of an error, if it is not 200; then `text` is its message.
    """

    text: str
    objects: tuple[dict, ...] = ()
    ending: str = "stop"
    status: int = 200
    retry_after: int | None = None


class FakeServer:
    """Answers each question with the next planned answer."""

    def __init__(self, models=("qwen_vl_chat", "adapter")):
        self.models = models
        self.key: str | None = None  # that requests to the API need
        self.planned: list[Answer] = []
        self.requests: list[dict] = []  # bodies of the questions
        self.keys: list[str | None] = []  # the Authorization header of each request to the API
        self.left = threading.Event()  # a client has left before the end of its answer
        handler = type("Handler", (_Handler,), {"outer": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}/"
        options = {"poll_interval": 0.01}
        threading.Thread(target=self._server.serve_forever, kwargs=options, daemon=True).start()

    def plan(self, *answers: Answer | str):
        for answer in answers:
            self.planned.append(Answer(answer) if isinstance(answer, str) else answer)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    outer: FakeServer

    def do_GET(self):
        if self.path == "/v1/models":
            self.outer.keys.append(self.headers["Authorization"])
            if self._lacks_key():
                return
            models = [{"id": name, "object": "model"} for name in self.outer.models]
            self._send(json.dumps({"object": "list", "data": models}).encode(), "application/json")
            return
        file = FILES / (self.path.strip("/") or "index.html")
        self._send(file.read_bytes(), TYPES[file.suffix])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.outer.requests.append(json.loads(body))
        self.outer.keys.append(self.headers["Authorization"])
        if self._lacks_key():
            return
        answer = self.outer.planned.pop(0)
        if answer.status != 200:
            self._refuse(answer)
            return
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            self._stream(answer)
        except OSError:
            self.outer.left.set()

    def _lacks_key(self):
        key = self.outer.key
        lacks = key is not None and self.headers["Authorization"] != f"Bearer {key}"
        if lacks:
            self._refuse(Answer("No key.", status=401))
        return lacks

    def _refuse(self, answer):
        error = {"error": {"message": answer.text, "type": "error", "code": None}}
        self._send(json.dumps(error).encode(), "application/json", answer)

    def _send(self, content, kind, answer=None):
        self.send_response(answer.status if answer else 200)
        if answer and answer.retry_after is not None:
            self.send_header("Retry-After", str(answer.retry_after))
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, answer):
        self._chunk({"role": "assistant", "content": ""})
        for start in range(0, len(answer.text), 3):  # most pieces end within markup
            self._chunk({"content": answer.text[start : start + 3]})
        while answer.ending == "never":
            time.sleep(0.01)
            self._chunk({"content": " more"})
        if answer.ending == "error":
            self._event({"error": {"message": "The engine has failed.", "code": 500}})
        if answer.ending in ("lost", "error"):
            return
        self._chunk({"objects": answer.objects} if answer.objects else {}, answer.ending)
        self._event({"choices": [], "usage": {"completion_tokens": 7}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, delta, finish_reason=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        self._event({"object": "chat.completion.chunk", "choices": [choice]})

    def _event(self, data):
        self.wfile.write(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_):
        pass
