"""A local web server for tests that sends files, fragments and errors as planned."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 40


class Server:
    """Answers each request for a path with the next answer planned for it, then with the last."""

    def __init__(self):
        self.planned = {}
        self.requests = []  # (path, Range, If-Range) of each request
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers["Range"], self.headers["If-Range"]))
                answers = outer.planned[self.path]
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        serve = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        serve.start()

    def plan(self, path, *answers):
        """Plans the answers to requests for `path`; returns its address."""
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
    encoding=None,
):
    """Returns an answer that sends `content`, or the range of it that is requested.

    Args:
        stops_after: number of bytes after which the connection ends.
        pauses: seconds before the connection ends.
        ranges: if false, the requested range is ignored.
        shift: number of bytes that the range begins too late.
        tag: the ETag.
        length: send a Content-Length.
        kind: the Content-Type.
        encoding: the Content-Encoding that the answer claims to have.
    """

    def answer(handler):
        requested = None
        if ranges and handler.headers["If-Range"] in (None, tag):
            requested = handler.headers["Range"]
        start = 0
        if requested:
            start = int(requested.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                handler.send_error(416)
                return
            start += shift
        handler.send_response(206 if requested else 200)
        if requested:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if length:
            handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("ETag", tag)
        handler.send_header("Content-Type", kind)
        if encoding:
            handler.send_header("Content-Encoding", encoding)
        handler.end_headers()
        handler.wfile.write(content[start:][:stops_after])
        handler.wfile.flush()
        time.sleep(pauses)
        handler.close_connection = True

    return answer


def refuses(code):
    """Returns an answer with an HTTP error."""
    return lambda handler: handler.send_error(code)


def hangs_up(handler):
    """Ends the connection without an answer."""
    handler.close_connection = True


def redirects(location, code=302):
    """Returns an answer that sends the client to another address."""

    def answer(handler):
        handler.send_response(code)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def repeats(beginning, piece, *, pause=0.0):
    """Returns an answer that sends bytes, then the same piece again and again without end."""

    def answer(handler):
        handler.close_connection = True
        try:
            handler.wfile.write(beginning)
            while True:
                handler.wfile.write(piece)
                handler.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass  # the client has left

    return answer
