import hashlib
import io
import multiprocessing

import pytest
from PIL import Image
from web_server import CONTENT, Server, gives, hangs_up, refuses

from qwenvl_lit.data.download import files as module
from qwenvl_lit.data.download.files import RemoteImage, RetryPolicy, fetch
from qwenvl_lit.types import DataError, ImageSource

MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
QUICK = RetryPolicy(tries=3, pause_seconds=0.01, timeout_seconds=2.0)


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "a.zip"


def files_beside(target):
    return sorted(path.name for path in target.parent.iterdir())


# One file


def test_a_file_is_downloaded_once(server, target):
    url = server.plan("/a.zip", gives())
    assert fetch(url, target, size=len(CONTENT), checksum=MD5) == target
    assert fetch(url, target, size=len(CONTENT), checksum=MD5) == target
    assert target.read_bytes() == CONTENT
    assert server.requests == [("/a.zip", None, None)]
    assert files_beside(target) == ["a.zip"]


@pytest.mark.parametrize(
    "known",
    [
        {},
        {"size": len(CONTENT)},
        {"checksum": MD5},
        {"checksum": "sha256:" + hashlib.sha256(CONTENT).hexdigest()},
    ],
)
def test_a_download_resumes_where_it_broke_off(server, target, known):
    url = server.plan(
        "/a.zip", gives(stops_after=100), gives(stops_after=50), refuses(503), hangs_up, gives()
    )
    fetch(url, target, **known, retries=QUICK)
    assert target.read_bytes() == CONTENT
    assert [request[1:] for request in server.requests] == [
        (None, None),
        ("bytes=100-", '"1"'),
    ] + 3 * [("bytes=150-", '"1"')]


def test_a_later_call_resumes_too(server, target):
    url = server.plan("/a.zip", gives(stops_after=100), refuses(500))
    with pytest.raises(
        DataError,
        match=r"a.zip cannot be downloaded, 3 tries in a row failed: the server says 500 .*; "
        r"try again later",
    ):
        fetch(url, target, size=len(CONTENT), retries=QUICK)
    assert files_beside(target) == ["a.zip.lock", "a.zip.part"]
    fetch(server.plan("/a.zip", gives()), target, size=len(CONTENT))
    assert server.requests[-1][1] == "bytes=100-"
    assert target.read_bytes() == CONTENT
    assert files_beside(target) == ["a.zip"]


def test_a_part_is_not_resumed_without_a_size_or_checksum(server, target):
    url = server.plan("/a.zip", gives(stops_after=100), refuses(500))
    with pytest.raises(DataError):
        fetch(url, target, retries=QUICK)
    fetch(server.plan("/a.zip", gives(CONTENT[::-1])), target)
    assert target.read_bytes() == CONTENT[::-1]


def sends_unnamed_part(handler):
    handler.send_response(206)
    handler.send_header("Content-Length", "10")
    handler.end_headers()
    handler.wfile.write(b"y" * 10)


@pytest.mark.parametrize(
    "then",
    [gives(ranges=False), gives(tag='"2"'), gives(shift=7), sends_unnamed_part],
    ids=["the server knows no ranges", "the file has changed", "another range", "some range"],
)
def test_parts_that_do_not_fit_are_not_joined(server, target, then):
    url = server.plan("/a.zip", gives(b"x" * len(CONTENT), stops_after=100), then, gives())
    fetch(url, target, checksum=MD5, retries=QUICK)
    assert target.read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_discarded(server, target):
    target.parent.mkdir()
    (target.parent / "a.zip.part").write_bytes(CONTENT + b"more")
    fetch(server.plan("/a.zip", gives()), target, checksum=MD5, retries=QUICK)
    assert target.read_bytes() == CONTENT


def test_a_stalled_transfer_is_resumed_with_a_new_request(server, target):
    url = server.plan("/a.zip", gives(stops_after=100, pauses=0.6), gives())
    fetch(
        url,
        target,
        checksum=MD5,
        retries=RetryPolicy(tries=2, pause_seconds=0.01, timeout_seconds=0.2),
    )
    assert [request[1] for request in server.requests] == [None, "bytes=100-"]
    assert target.read_bytes() == CONTENT


def test_without_a_length_the_published_size_decides_whether_it_is_complete(server, target):
    url = server.plan("/a.zip", gives(stops_after=100, length=False), gives(length=False))
    fetch(url, target, size=len(CONTENT), retries=QUICK)
    assert target.read_bytes() == CONTENT
    longer = server.plan("/b.zip", gives(CONTENT + b"more", length=False))
    with pytest.raises(DataError, match=r"b.zip has 10244 bytes .*, but 10240 were published"):
        fetch(longer, target.with_name("b.zip"), size=len(CONTENT))


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (401, "it needs a login: download it yourself"),
        (403, "the server refuses this program: .*data.user_agent"),
        (404, "check the address"),
        (410, "check the address"),
    ],
)
def test_a_client_error_is_not_retried(server, target, code, advice):
    with pytest.raises(
        DataError,
        match=rf"/a.zip cannot be downloaded: the server says {code} .*; {advice}",
    ):
        fetch(server.plan("/a.zip", refuses(code)), target, retries=QUICK)
    assert len(server.requests) == 1
    assert not target.exists()


def test_an_unreachable_server_is_a_data_error(server, target):
    url = server.plan("/a.zip", gives())
    server.close()
    with pytest.raises(DataError, match="3 tries in a row failed: no answer"):
        fetch(url, target, retries=QUICK)


def test_another_file_than_the_published_one_is_refused(server, target):
    page = gives(b"<html>please log in</html>", kind="text/html")
    with pytest.raises(
        DataError, match=r"has 26 bytes \(text/html\), but 10240 were published; it is another file"
    ):
        fetch(server.plan("/a.zip", page), target, size=len(CONTENT))
    with pytest.raises(
        DataError,
        match=rf"is not the published file: its md5 is \w+, expected {MD5[4:]}; "
        r"the download was removed",
    ):
        fetch(server.plan("/a.zip", page), target, checksum=MD5)
    assert not target.exists()
    assert files_beside(target) == ["a.zip.lock"]


def test_a_file_of_another_size_is_not_taken_for_the_published_one(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"half")
    with pytest.raises(DataError, match=r"a.zip has 4 bytes, but 10240 were published; remove it"):
        fetch("http://localhost/a.zip", tmp_path / "a.zip", size=len(CONTENT))


@pytest.mark.parametrize(
    "why", ["data.download=false", "QWENVL_LIT_OFFLINE is set", "HF_HUB_OFFLINE is set"]
)
def test_when_downloads_are_off_the_error_says_what_to_get(server, target, monkeypatch, why):
    if why.endswith("is set"):
        monkeypatch.setenv(why.split()[0], "1")
    url = server.plan("/a.zip", gives())
    with pytest.raises(DataError) as error:
        fetch(url, target, size=6_645_013_297, download="=" not in why)
    assert str(error.value) == (
        f"{target} does not exist and downloads are off ({why}); "
        f"get it from {url} (6.65 GB) and put it there"
    )
    assert server.requests == []


def test_size_and_target_are_logged_before_it_starts(server, target, caplog):
    url = server.plan("/a.zip", gives())
    with caplog.at_level("INFO"):
        fetch(url, target, size=len(CONTENT))
    assert caplog.messages == [f"downloading {url} (10.2 kB) to {target}"]


def test_a_target_that_cannot_be_written_is_a_data_error(server, tmp_path):
    (tmp_path / "new").write_text("a file, not a folder")
    with pytest.raises(
        DataError, match=r"a.zip cannot be written: .*; free disk space, or choose another folder"
    ):
        fetch(server.plan("/a.zip", gives()), tmp_path / "new" / "a.zip")


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://localhost/a.zip", "a.zip", "javascript:1"]
)
def test_only_http_addresses_are_downloaded(tmp_path, url):
    with pytest.raises(DataError, match="is not an http or https address"):
        fetch(url, tmp_path / "a.zip")
    with pytest.raises(DataError, match="is not an http or https address"):
        RemoteImage(url, tmp_path)


def fetch_at_once(url, target):
    fetch(url, target, checksum=MD5, retries=QUICK)


def test_one_of_several_processes_downloads_it(server, target):
    url = server.plan("/a.zip", gives(pauses=0.2))
    processes = [
        multiprocessing.get_context("fork").Process(target=fetch_at_once, args=(url, target))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(server.requests) == 1
    assert target.read_bytes() == CONTENT


# Images


def local_image(url, folder, **options):
    """An image of the test's own server, whose host is not public."""
    return RemoteImage(url, folder, allow_private_hosts=True, **options)


def png(width=4, height=3):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def test_a_remote_image_is_fetched_when_it_is_needed(server, tmp_path):
    image = ImageSource(
        local_image(server.plan("/a.PNG?size=1", gives(png())), tmp_path / "images")
    )
    assert server.requests == []
    assert image.size == (4, 3)
    assert image.open().getpixel((0, 0)) == (255, 0, 0)
    assert image.name == image.source.url
    assert len(server.requests) == 1
    again = RemoteImage(image.source.url, tmp_path / "images", download=False)
    assert again.path() == image.source.path()
    assert [path.suffix for path in (tmp_path / "images").iterdir()] == [".png"]


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "cache").touch()
    image = ImageSource(local_image(server.plan("/a.png", gives(png())), tmp_path / "cache/images"))
    with pytest.raises(
        DataError, match=r"cache/images/.* cannot be written: .*paths\.cache=FOLDER"
    ):
        image.open()


def test_a_download_names_itself_as_the_user_says(server, tmp_path):
    names = []

    def note_name(handler):
        names.append(handler.headers["User-Agent"])
        gives(png())(handler)

    for number, name in enumerate((None, "me@example.org")):
        url = server.plan(f"/{number}.png", note_name)
        local_image(url, tmp_path, user_agent=name).path()
    assert names == ["qwenvl_lit", "me@example.org"]


def test_an_address_may_contain_spaces_and_letters_of_any_script(server, tmp_path):
    address = (
        server.plan("/a%20b/%E5%9B%BE%25.png", gives(png()))
        .replace("%20", " ")
        .replace("%E5%9B%BE", "图")
    )
    assert ImageSource(local_image(address, tmp_path)).size == (4, 3)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:port/a.png",
        "http://[::1/a.png",
        "http://local\nhost/a.png",
        "http:///a.png",
    ],
)
def test_a_broken_address_is_a_data_error(tmp_path, url):
    with pytest.raises(DataError):
        RemoteImage(url, tmp_path, retries=QUICK).path()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            gives(b"<html>gone</html>"),
            r"image http:.*/a.png .*: it is a web page \(HTML\), not an image",
        ),
        (gives(png()[:30]), r"/a.png cannot be read as an image: .*; fetch it again"),
        (gives(b""), r"/a.png cannot be read as an image: the file is empty; fetch it again"),
        (gives(b"words"), "its format is unknown; it begins with b'words'"),
        (refuses(404), "the server says 404"),
        (hangs_up, "3 tries in a row failed: no answer"),
    ],
)
def test_a_download_that_is_no_image_is_removed(server, tmp_path, answer, message):
    with pytest.raises(DataError, match=message):
        local_image(server.plan("/a.png", answer), tmp_path, retries=QUICK).path()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [True, False])
def test_an_image_above_the_size_limit_is_refused(server, tmp_path, monkeypatch, length):
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 50)
    with pytest.raises(DataError, match=r"the limit (is|of) 50 bytes"):
        local_image(server.plan("/a.png", gives(png(), length=length)), tmp_path).path()
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_arrives_too_slowly_is_refused(server, tmp_path):
    url = server.plan("/a.png", *[gives(png(), stops_after=1)] * 60)
    with pytest.raises(DataError, match=r"is too slow: \d+ bytes in 0 s"):
        local_image(
            url, tmp_path, retries=RetryPolicy(tries=9, pause_seconds=0.02, total_seconds=0.1)
        ).path()


def test_a_missing_image_is_refused_offline(tmp_path):
    image = RemoteImage("http://localhost/a.png", tmp_path, download=False)
    with pytest.raises(
        DataError, match=r"image http://localhost/a.png is not in .* and downloads are off"
    ):
        image.path()
