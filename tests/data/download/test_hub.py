"""Datasets of the hub, from a local server that answers as the hub, and from a cache."""

import json
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from qwenvl_lit.data.download import hub
from qwenvl_lit.data.readers.rows import ReadOptions
from qwenvl_lit.data.readers.sources import read_rows
from qwenvl_lit.types import DataError

OFF = "downloads are off"


def parquet(*texts) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"query": list(texts)}), sink)
    return sink.getvalue().to_pybytes()


class Hub:
    """Repositories by name: their files by revision, and an answer for what is refused."""

    def __init__(self):
        self.repositories = {}
        self.refusals = {}  # name -> status and error code of the hub
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.command, urlsplit(self.path).path))
                status, headers, content = outer.answer(unquote(urlsplit(self.path).path))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        serve = self.server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, name, files, revision="main", **card):
        self.repositories.setdefault(name, {})[revision] = files, card

    def answer(self, path):
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[1:3])
        if name in self.refusals:
            status, code = self.refusals[name]
            return status, {"X-Error-Code": code, "X-Error-Message": "no"}, b""
        rest = parts[4:] if is_api else parts[3:]
        revisions = self.repositories[name]
        by_commit = {self.commit(name, revision): revision for revision in revisions}
        asked = "/".join(rest[1:]) or "main"
        revision = next((each for each in revisions if f"{asked}/".startswith(f"{each}/")), None)
        if revision is None and rest[1:]:
            revision = by_commit.get(rest[1])
        if revision is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files, card = revisions[revision]
        commit = self.commit(name, revision)
        if not is_api:
            content = files["/".join(rest[2:])]
            tag = f'"{sha256(content).hexdigest()}"'
            return 200, {"ETag": tag, "X-Repo-Commit": commit}, content
        if rest[:1] == ["tree"]:
            entries = []
            for file, content in files.items():
                oid = sha256(content).hexdigest()[:40]
                entries.append({"type": "file", "path": file, "size": len(content), "oid": oid})
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
        info = {"id": name, "sha": commit, "siblings": siblings, "cardData": card, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    @staticmethod
    def commit(name, revision):
        return sha256(f"{name}@{revision}".encode()).hexdigest()[:40]


@pytest.fixture(scope="module")
def running():
    served = Hub()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture
def served(running, tmp_path, monkeypatch):
    """A hub without repositories, and an empty cache."""
    running.repositories, running.refusals, running.requests = {}, {}, []
    endpoint = f"http://127.0.0.1:{running.server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.hub_files.cache_clear()
    yield running
    hub.hub_files.cache_clear()


def texts(address, **options):
    rows = read_rows(address, ReadOptions(**options))
    return [row.turns[0].parts[0] for row in rows]


SHARDS = {
    "README.md": b"---\npretty_name: A\n---\n",
    "data/train-00000-of-00002.parquet": parquet("a", "b"),
    "data/train-00001-of-00002.parquet": parquet("c"),
    "data/test-00000-of-00001.parquet": parquet("d"),
    "a.jpg": b"an image",
}


def test_a_split_is_downloaded_once_and_then_read_offline(served, monkeypatch):
    served.add("me/set", SHARDS)
    assert texts("hf://me/set:train") == ["a", "b", "c"]
    assert texts("hf://me/set:train#2") != []
    fetched = [path for command, path in served.requests if command == "GET" and "resolve" in path]
    assert sorted(path.rpartition("/")[2] for path in fetched) == [
        "README.md",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.hub_files.cache_clear()
    served.requests.clear()
    assert texts("hf://me/set:train") == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"has no split 'test'.* in .*hub.*, and downloads are off"):
        texts("hf://me/set:test")
    assert served.requests == []


def test_without_the_hub_the_cache_is_used(served, monkeypatch, caplog):
    served.add("me/set", SHARDS)
    texts("hf://me/set:train")
    hub.hub_files.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert texts("hf://me/set:train") == ["a", "b", "c"]
    assert "cannot be fetched from http://127.0.0.1:9" in caplog.text
    with pytest.raises(DataError, match="hf://me/other cannot be fetched"):
        texts("hf://me/other:train")


CARD = {
    "configs": [
        {"config_name": "en", "data_files": [{"split": "train", "path": "x/*.parquet"}]},
        {"config_name": "de", "data_files": {"test": ["y/0.parquet"], "dev": "y/[1-2].parquet"}},
        {"config_name": "fr", "data_dir": "z", "data_files": "**/*.parquet"},
        {"config_name": "text", "data_files": "a.csv"},
    ]
}
NAMED = ("x/1.parquet", "y/0.parquet", "y/1.parquet", "z/0.parquet", "a.csv")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://me/set:en/train", ["x/1.parquet"]),
        ("hf://datasets/me/set:de/test", ["y/0.parquet"]),
        ("hf://me/set@main:de/dev", ["y/1.parquet"]),
        ("hf://me/set:fr/train", ["z/0.parquet"]),
        ("hf://me/set/y/*.parquet", ["y/0.parquet", "y/1.parquet"]),
        ("hf://me/set@main/x/1.parquet", ["x/1.parquet"]),
    ],
)
def test_configs_and_splits_are_those_of_the_card(address, expected):
    assert hub._chosen(hub.parse_address(address), NAMED, CARD) == expected


def test_names_of_files_say_split_and_config():
    names = [
        "data/train-00000-of-00001-0123abcd.parquet",
        "en/validation/0000.parquet",
        "en/my-dev.parquet",
        "data/de/test.parquet",
        "part.parquet",
        "fr/partial-train/0000.parquet",
    ]
    assert hub._splits_by_name(names) == {
        "default": {"train": [names[0], names[4]]},
        "en": {"validation": names[1:3]},
        "de": {"test": [names[3]]},
        "fr": {"train": [names[5]]},
    }


def test_other_formats_are_read_from_the_hubs_own_copy(served):
    served.add("me/set", {"rows.csv": b"query\na\n"})
    copy = {"default/train/0000.parquet": parquet("copy"), "default/test/0000.parquet": b""}
    served.add("me/set", copy, revision="refs/convert/parquet")
    assert texts("hf://me/set:train") == ["copy"]
    assert texts("hf://me/set@~parquet:train") == ["copy"]
    assert texts("hf://me/set/rows.csv") == ["a"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://set:train", "is no dataset of the hub; expected hf://OWNER/NAME:SPLIT"),
        ("hf://me/set", "hf://me/set has several splits: test, train; write hf://me/set:train"),
        ("hf://me/set:val", "hf://me/set has no split 'val': test, train; write hf://me/set:"),
        ("hf://me/set:en/train", "has no config 'en': default; write hf://me/set:default/train"),
        ("hf://me/set/x*.parquet", "hf://me/set has no file x*.parquet"),
        ("hf://me/set@v2:train", "hf://me/set@v2 has no revision v2"),
        ("hf://me/images:train", "has no parquet files, and the hub has made none"),
        ("hf://me/large:train", "has only the beginning of default/train; download"),
        ("hf://me/gated:train", "is gated: accept its conditions at http://127.0.0.1:"),
        ("hf://me/private:train", "does not exist, or is private: check the name"),
        ("hf://me/down:train", "hf://me/down cannot be fetched from http://127.0.0.1:"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(served, address, message):
    served.add("me/set", SHARDS)
    served.add("me/images", {"a.jpg": b""})
    served.add("me/large", {"a.jpg": b""})
    copy = {"default/partial-train/0000.parquet": b""}
    served.add("me/large", copy, revision="refs/convert/parquet")
    served.refusals["me/gated"] = 403, "GatedRepo"
    served.refusals["me/private"] = 401, "RepoNotFound"
    served.refusals["me/down"] = 500, ""
    with pytest.raises(DataError) as error:
        read_rows(address)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def cached(folder, files, name="me--set", revision="main"):
    """Writes a snapshot into the cache as huggingface_hub does, without a list of its files."""
    repository = folder / "hub" / f"datasets--{name}"
    snapshot = repository / "snapshots" / ("0" * 40)
    for file, content in files.items():
        blob = repository / "blobs" / sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).symlink_to(blob)
    (repository / "refs" / revision).parent.mkdir(parents=True)
    (repository / "refs" / revision).write_text("0" * 40)


def test_data_download_false_reads_what_another_program_has_put_into_the_cache(served, tmp_path):
    cached(tmp_path, SHARDS)
    assert texts("hf://me/set:train", download=False) == ["a", "b", "c"]
    assert texts("hf://me/set:test", download=False) == ["d"]
    assert served.requests == []


def test_a_cache_without_a_shard_is_refused(served, tmp_path):
    cached(tmp_path, {name: SHARDS[name] for name in list(SHARDS)[1:2]})
    with pytest.raises(DataError, match=r"data/train has only 1 of 2 files .*data.download=false"):
        texts("hf://me/set:train", download=False)
