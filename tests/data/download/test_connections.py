import gzip
import io
import socket
import time
import zlib

import pytest
from PIL import Image
from web_server import CONTENT, Server, gives, redirects, repeats

from qwenvl_lit.data.download import connections
from qwenvl_lit.data.download.connections import Hosts, Limits, is_public
from qwenvl_lit.data.download.files import RemoteImage, RetryPolicy, fetch
from qwenvl_lit.types import DataError


def png():
    file = io.BytesIO()
    Image.effect_noise((40, 30), 60).save(file, "PNG")
    return file.getvalue()


PNG = png()
HASTY = RetryPolicy(tries=2, pause_seconds=0.01, timeout_seconds=0.3, total_seconds=1.0)


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def local_image(url, folder, **options):
    return RemoteImage(url, folder, allow_private_hosts=True, **options)


def refusal(image):
    """The one line that a download which fails is refused with; nothing is left of it."""
    with pytest.raises(DataError) as error:
        image.path()
    assert list(image.folder.iterdir()) == []
    assert str(error.value).isprintable()
    return str(error.value)


# Servers that do not end


@pytest.mark.parametrize(
    ("beginning", "piece", "pause"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n", 0.05),
        (b"HTTP/1.1 200 OK\r\nX-More: ", b"x", 0.05),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
        (b"HTTP/1.1 100 Continue\r\n", b"X-More: 1\r\n", 0.0),
        (b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n", b"endless body", 0.0),
        (b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n", b"slow body", 0.05),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x", 0.05),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.05),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.05),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X-More: 1\r\n", 0.05),
    ],
    ids=[
        *("slow headers", "a slow header", "slow interim answers", "interim answers"),
        *("headers of an interim answer", "body of a redirect", "slow body of a redirect"),
        *("slow body", "slow body of no length", "slow chunks", "slow trailers"),
    ],
)
def test_no_answer_outlasts_the_time_limit(server, tmp_path, beginning, piece, pause):
    url = server.plan("/a.png", repeats(beginning, piece, pause=pause))
    start = time.monotonic()
    assert url in refusal(local_image(url, tmp_path, retries=HASTY))
    assert time.monotonic() - start < 2.5


def test_headers_have_a_size_limit_too(server, tmp_path):
    url = server.plan("/a.png", repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n"))
    patient = RetryPolicy(tries=1, pause_seconds=0.01, timeout_seconds=60.0)
    assert "more than 262144 bytes of headers" in refusal(
        local_image(url, tmp_path, retries=patient)
    )


def test_a_download_has_a_time_limit_by_default():
    assert RetryPolicy().total_seconds <= 24 * 3600


def test_tries_end_at_the_time_limit(server, tmp_path):
    url = server.plan("/a.png", gives(PNG, stops_after=0))
    policy = RetryPolicy(tries=99, pause_seconds=0.2, timeout_seconds=1.0, total_seconds=0.5)
    assert "is too slow: 0 bytes in 0 s" in refusal(local_image(url, tmp_path, retries=policy))


def test_a_body_longer_than_the_published_size_is_not_written(server, tmp_path):
    url = server.plan("/a.zip", repeats(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1000)))
    with pytest.raises(DataError, match=r"bytes .*, but 5000 were published"):
        fetch(url, tmp_path / "a.zip", size=5000, retries=HASTY)
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip.lock"]


# Hosts


@pytest.mark.parametrize(
    ("ip", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        *[(ip, False) for ip in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1")],
        *[(ip, False) for ip in ("169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1")],
        *[(ip, False) for ip in ("240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1")],
        *[(ip, False) for ip in ("::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1")],
        *[(ip, False) for ip in ("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::")],
        *[(ip, False) for ip in ("::127.0.0.1", "2001:db8::1", "2001::1")],
    ],
)
def test_addresses_of_this_machine_and_its_network_are_not_public(ip, public):
    assert is_public(ip) == public


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "[::1]", "0.0.0.0"]
)
def test_a_private_host_is_refused_unless_it_is_allowed(tmp_path, host):
    line = refusal(RemoteImage(f"http://{host}:9/a.png", tmp_path, retries=HASTY))
    assert line.startswith(f"http://{host}:9/a.png is not downloaded: ")
    assert "no public address" in line
    assert "data.allow_private_hosts=true" in line


def test_an_allowed_private_host_is_reached(server, tmp_path):
    url = server.plan("/a.png", gives(PNG))
    assert local_image(url, tmp_path).path().read_bytes() == PNG


def resolves(monkeypatch, **ips):
    """Lets host names of one label resolve to addresses; returns the names that were resolved."""
    resolved = []
    original = socket.getaddrinfo

    def getaddrinfo(host, port, **options):
        resolved.append(host)
        return original(ips.get(host, host), port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return resolved


def test_an_unknown_host_is_named_so(tmp_path):
    line = refusal(RemoteImage("http://no.such.host.invalid/a.png", tmp_path, retries=HASTY))
    assert "unknown host" in line
    assert "urlopen" not in line


def test_a_name_that_resolves_to_a_private_address_is_refused(tmp_path, monkeypatch):
    resolves(monkeypatch, rebound="127.0.0.1")
    line = refusal(RemoteImage("http://rebound:9/a.png", tmp_path, retries=HASTY))
    assert "rebound (127.0.0.1) is no public address" in line


def test_the_connection_goes_to_the_address_that_was_checked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "is_public", lambda ip: True)
    resolved = resolves(monkeypatch, friendly="127.0.0.1")
    url = server.plan("/a.png", gives(PNG)).replace("127.0.0.1", "friendly")
    assert RemoteImage(url, tmp_path).path().read_bytes() == PNG
    assert resolved == ["friendly"]  # a second look-up could have given another address


@pytest.mark.parametrize("allow", [False, True])
def test_a_redirect_to_a_private_host_is_refused(server, tmp_path, monkeypatch, allow):
    resolves(monkeypatch, elsewhere="127.0.0.1")
    monkeypatch.setattr(connections, "is_public", lambda ip: ip != "127.0.0.2")
    secret = server.plan("/secret.png", gives(PNG)).replace("127.0.0.1", "127.0.0.2")
    url = server.plan("/a.png", redirects(secret)).replace("127.0.0.1", "elsewhere")
    image = RemoteImage(url, tmp_path, allow_private_hosts=allow)
    assert f"{url} redirects to 127.0.0.2 (127.0.0.2), which is no public address" in refusal(image)
    with pytest.raises(DataError, match=r"redirects to 127\.0\.0\.2 "):
        fetch(url, tmp_path / "a.zip")
    assert {request[0] for request in server.requests} == {"/a.png"}


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_on_the_same_host_is_followed(server, tmp_path, code):
    server.plan("/b.png", gives(PNG))
    url = server.plan("/a.png", redirects("/b.png", code))
    assert local_image(url, tmp_path).path().read_bytes() == PNG


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:image/png;base64,aa", "x:1"]
)
def test_a_redirect_stays_with_http(server, tmp_path, location):
    url = server.plan("/a.png", redirects(location))
    line = refusal(local_image(url, tmp_path))
    assert line.startswith(f"{url} redirects, but '{location}' is not an http or https address")


def test_the_number_of_redirects_is_limited(server, tmp_path):
    for step in range(20):
        server.plan(f"/{step}", redirects(f"/{step + 1}"))
    url = server.plan("/0", redirects("/1"))
    assert "too many redirects" in refusal(local_image(url, tmp_path))
    assert len(server.requests) <= 1 + connections.MAX_REDIRECTS
    loop = server.plan("/loop", redirects("/loop"))
    assert "too many redirects" in refusal(local_image(loop, tmp_path))


@pytest.mark.parametrize("where", ["reason", "location", "encoding", "url"])
def test_control_characters_of_a_server_are_escaped(server, tmp_path, where):
    answers = {
        "reason": b"HTTP/1.1 404 \x1b[2Jgone\r\n\r\n",
        "location": b"HTTP/1.1 302 Found\r\nLocation: file:///\x1b[2J\r\n\r\n",
        "encoding": b"HTTP/1.1 200 OK\r\nContent-Encoding: \x1b[2J\r\n\r\n",
        "url": b"HTTP/1.1 404 gone\r\n\r\n",
    }

    def answer(handler):
        handler.close_connection = True
        handler.wfile.write(answers[where])

    url = server.plan("/a.png", answer)
    refusal(local_image(url + "\x1b[2J" if where == "url" else url, tmp_path, retries=HASTY))


# Proxies


def test_a_proxy_of_the_environment_resolves_the_names(server, tmp_path, monkeypatch):
    url = "http://images.example/a.png"
    proxy = server.plan(url, gives(PNG)).removesuffix(url)
    monkeypatch.setenv("http_proxy", proxy)
    assert RemoteImage(url, tmp_path).path().read_bytes() == PNG


@pytest.mark.parametrize("host", ["10.0.0.1", "0x0a.1", "167772161", "[fc00::1]", "x.localhost"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_written_private_addresses_are_refused_through_a_proxy_too(
    server, tmp_path, monkeypatch, scheme, host
):
    monkeypatch.setenv(f"{scheme}_proxy", server.plan("", gives(PNG)))
    assert "no public address" in refusal(RemoteImage(f"{scheme}://{host}/a.png", tmp_path))
    assert server.requests == []


# TLS


def test_tls_is_spoken_to_the_checked_address_under_its_name(server, monkeypatch):
    names = []

    class Context:
        verify_mode, check_hostname = 2, True  # CERT_REQUIRED

        def wrap_socket(self, sock, server_hostname):
            names.append((sock.getpeername()[0], server_hostname))
            return sock

    resolves(monkeypatch, named="127.0.0.1")
    url = server.plan("/a", gives()).replace("http://127.0.0.1", "https://named")
    limits = Limits(idle_seconds=2.0, deadline=time.monotonic() + 5)
    connection = connections._HTTPSConnection(
        url.split("/")[2],
        hosts=Hosts(url=url, allow_private=True),
        limits=limits,
        context=Context(),
    )
    connection.request("GET", "/a")
    with connection.getresponse() as response:
        assert response.read() == CONTENT
    assert names == [("127.0.0.1", "named")]


# Content-Encoding


def raw_deflate(content):
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(PNG)),
        ("x-gzip", gzip.compress(PNG[:99]) + gzip.compress(PNG[99:]) + bytes(8)),
        ("deflate", zlib.compress(PNG)),
        ("Deflate", raw_deflate(PNG)),
        ("identity", PNG),
    ],
)
@pytest.mark.parametrize("length", [True, False])
def test_a_compressed_answer_is_decoded(server, tmp_path, encoding, body, length):
    url = server.plan("/a.png", gives(body, encoding=encoding, length=length))
    assert local_image(url, tmp_path).path().read_bytes() == PNG


def test_the_size_limit_holds_for_decoded_bytes(server, tmp_path):
    bomb = gzip.compress(bytes(100_000_000))
    url = server.plan("/a.png", gives(bomb, encoding="gzip"))
    assert "larger than the limit of 67.1 MB" in refusal(local_image(url, tmp_path))
    with pytest.raises(DataError, match="but 10240 were published"):
        fetch(url, tmp_path / "a.zip", size=len(CONTENT), retries=HASTY)


def test_a_compressed_transfer_that_breaks_off_starts_again(server, tmp_path):
    body = gzip.compress(CONTENT)
    url = server.plan(
        "/a.zip",
        gives(body, encoding="gzip", stops_after=60),
        gives(body, encoding="gzip"),
    )
    fetch(url, tmp_path / "a.zip", size=len(CONTENT), retries=HASTY)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert [request[1] for request in server.requests] == [None, None]


@pytest.mark.parametrize(
    ("encoding", "body", "message"),
    [
        ("gzip", PNG, "its gzip encoding is broken"),
        ("gzip", gzip.compress(PNG)[:-9], "its gzip encoding ends too early"),
        ("br", PNG, "Content-Encoding 'br', and only gzip and deflate are decoded"),
        ("gzip, gzip", PNG, "Content-Encoding 'gzip, gzip'"),
    ],
)
def test_a_broken_or_unknown_encoding_is_refused(server, tmp_path, encoding, body, message):
    url = server.plan("/a.png", gives(body, encoding=encoding))
    assert message in refusal(local_image(url, tmp_path, retries=HASTY))
