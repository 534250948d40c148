"""A local server that speaks the endpoints of the Hugging Face Hub which an upload uses."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

READER = {"accessToken": {"role": "read"}}
WRITER = {"accessToken": {"role": "write"}}


class HubServer:
    """Keeps repositories in memory.

    Attributes:
        tokens: token -> the answer to "who am I".
        repositories: name -> whether it is private, and the content of its files.
        stored: hash -> content of large files, those of which have the names in `large`.
        refused: pattern of a request's method and path -> status and message of the answer.
        requests: method and path of each request.
    """

    def __init__(self):
        self.tokens = {"hf_ann": {"name": "Ann", "orgs": [], "auth": WRITER}}
        self.repositories = {}
        self.stored = {}
        self.large = r".*\.safetensors"
        self.refused = {}
        self.requests = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        serve = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        serve.start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def sent(self, pattern):
        """The requests that match `pattern`."""
        return [request for request in self.requests if re.search(pattern, request)]

    def answer(self, request, token, body):
        """Returns the status and the JSON of the answer to a request."""
        for pattern, refusal in self.refused.items():
            if re.search(pattern, request):
                return refusal
        if token not in self.tokens:
            return 401, {"error": "Invalid credentials"}
        if request == "GET /api/whoami-v2":
            return 200, self.tokens[token]
        if request == "POST /api/repos/create":
            return self._create(json.loads(body))
        if request == "POST /api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"PUT /large/(\w+)", request):
            self.stored[found[1]] = body
            assert hashlib.sha256(body).hexdigest() == found[1]
            return 200, {}
        found = re.search(r" (?:/api/models)?/([\w-]+/[\w-]+)(?:\.git)?(.*)", request)
        if found[1] not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._of_repository(found[1], found[2], body)

    def _create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.repositories[name] = {"private": private, "files": {}}
        return 200, {"url": f"{self.address}/{name}"}

    def _of_repository(self, name, rest, body):
        repository = self.repositories[name]
        files = repository["files"]
        if rest == "":
            listed = [{"rfilename": file} for file in files]
            private = repository["private"]
            return 200, {"id": name, "sha": "1", "private": private, "siblings": listed}
        if rest == "/auth-check/write":
            return 200, {}
        if rest == "/preupload/main":
            modes = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if re.fullmatch(self.large, file["path"]) else "regular"
                modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            return 200, {"files": modes}
        if rest == "/info/lfs/objects/batch":
            objects = []
            for wanted in json.loads(body)["objects"]:
                if wanted["oid"] not in self.stored:
                    upload = {"href": f"{self.address}/large/{wanted['oid']}"}
                    wanted["actions"] = {"upload": upload}
                objects.append(wanted)
            return 200, {"transfer": "basic", "objects": objects}
        assert rest == "/commit/main", rest
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        url = f"{self.address}/{name}/commit/2"
        return 200, {"success": True, "commitOid": "2", "commitUrl": url}


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            length = self.headers["Content-Length"]
            body = self.rfile.read(int(length)) if length else self._chunks()
            request = f"{self.command} {self.path}"
            hub.requests.append(request)
            token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            if self.command == "PUT":  # to storage, whose addresses are signed
                token = "hf_ann"
            status, answer = hub.answer(request, token, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            if "error" in answer:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def _chunks(self):
            body = b""
            while self.headers["Transfer-Encoding"] == "chunked":
                size = int(self.rfile.readline(), 16)
                body += self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
            return body

        def log_message(self, *_):
            pass

    return Handler
