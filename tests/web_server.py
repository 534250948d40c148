"""A web server on this machine that breaks off, refuses, and sends other things than it should."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 40


class Server:
    """A web server on this machine that answers each request for a path with the next of the answers planned for it, the last for ever."""

    def __init__(self):
        self.planned = {}
        self.asked = []  # (path, Range, If-Range) of each request
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers["Range"], self.headers["If-Range"]))
                answers = outer.planned[self.path]
                (answers.pop(0) if len(answers) > 1 else answers[0])(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def plan(self, path, *answers):
        self.planned[path] = list(answers)
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def gives(
    content=CONTENT,
    *,
    stops_after=None,
    pauses=0.0,
    ranges=True,
    shift=0,
    tag='"1"',
    length=True,
    kind="application/zip",
):
    """An answer with `content`, or the part that is asked for; perhaps only the first bytes of that, and then the line is cut."""

    def answer(handler):
        asked = (
            handler.headers["Range"]
            if ranges and handler.headers["If-Range"] in (None, tag)
            else None
        )
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and start >= len(content):
            handler.send_error(416)
            return
        start += shift if asked else 0
        handler.send_response(206 if asked else 200)
        if asked:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if length:
            handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("ETag", tag)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        handler.wfile.write(content[start:][:stops_after])
        handler.wfile.flush()
        time.sleep(pauses)
        handler.close_connection = True

    return answer


def refuses(code):
    return lambda handler: handler.send_error(code)


def hangs_up(handler):
    handler.close_connection = True
