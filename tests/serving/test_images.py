"""Images from http addresses: allowed hosts only, public addresses only, no redirects, limits."""

import base64
import io
import socket
import time

import pytest
from PIL import Image
from serving.served import data_uri
from web_server import Server, gives, redirects, refuses, repeats

from qwenvl_lit.data.download import connections
from qwenvl_lit.serving.images import ImageLoader
from qwenvl_lit.types import DataError


def png():
    file = io.BytesIO()
    Image.effect_noise((40, 30), 60).save(file, "PNG")
    return file.getvalue()


PNG = png()


@pytest.fixture
def web():
    with Server() as web:
        yield web


@pytest.fixture(autouse=True)
def resolved(monkeypatch):
    """Names resolve to the address of the local server; lists the names that were resolved."""
    names = []
    original = socket.getaddrinfo

    def resolve(host, port, *arguments, **options):
        names.append(host)
        return original("127.0.0.1", port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names


@pytest.fixture
def local_is_public(monkeypatch):
    monkeypatch.setattr(connections, "is_public", lambda ip: True)


def loader(*hosts, seconds=2.0, max_bytes=10_000):
    return ImageLoader(allowed_hosts=hosts, max_bytes=max_bytes, max_pixels=10_000, seconds=seconds)


def load(url, **options):
    """Loads an image whose host is allowed; its name is that of the local server."""
    host = url.split("/")[2]
    return loader(host, **options).load(url)


def named(url):
    return url.replace("127.0.0.1", "images.example")


def refusal(url, **options):
    with pytest.raises(DataError) as error:
        load(url, **options)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.usefixtures("local_is_public")
def test_an_image_of_an_allowed_host_is_fetched(web):
    url = named(web.plan("/a.png", gives(PNG)))
    assert load(url).size == (40, 30)
    assert load(url.replace("images", "IMAGES")).size == (40, 30)


@pytest.mark.parametrize("allowed", [(), ("other.example",), ("images.example",)])
def test_a_host_and_its_port_have_to_be_allowed(web, resolved, allowed):
    url = named(web.plan("/a.png", gives(PNG)))
    with pytest.raises(DataError, match=r"not in serve\.allowed_hosts"):
        loader(*allowed).load(url)
    assert resolved == web.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example@evil.example/a.png",
        "http://images.example:80@evil.example/a.png",
        "http://images.example\\@evil.example/a.png",
        "http://evil.example#@images.example/a.png",
        "http://evil.example/http://images.example/a.png",
        "http://images.example.evil.example/a.png",
        "http://evil%2eexample/a.png",
        "http:///images.example/a.png",
        "http://images.example:8080/a.png",
    ],
)
def test_an_address_that_only_looks_allowed_is_not_fetched(resolved, url):
    with pytest.raises(DataError):
        loader("images.example").load(url)
    assert resolved == []


def test_an_allowed_host_with_a_private_address_is_never_fetched(web, resolved):
    line = refusal(named(web.plan("/a.png", gives(PNG))))
    assert "(127.0.0.1) is no public address; private and loopback addresses are" in line
    assert resolved == ["images.example"]
    assert web.requests == []


def test_a_name_is_resolved_once_and_the_address_that_was_checked_is_connected_to(monkeypatch):
    connected, answers = [], ["93.184.216.34", "127.0.0.1"]

    def resolve(host, port, *_, **__):
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, (answers.pop(0), port))]

    def connect(self, address):
        connected.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert "cannot be fetched" in refusal("http://images.example/a.png")
    assert connected == ["93.184.216.34"]
    assert answers == ["127.0.0.1"]


@pytest.mark.usefixtures("local_is_public")
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(web, code):
    target = web.plan("/private", gives(PNG))
    url = named(web.plan("/a.png", redirects(target, code)))
    assert "redirects to another address, which is not followed" in refusal(url)
    assert [path for path, *_ in web.requests] == ["/a.png"]


@pytest.mark.usefixtures("local_is_public")
def test_proxies_are_not_used(web, monkeypatch):
    proxy = web.plan("http://images.example/a.png", gives(PNG)).split("http://images")[0]
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    url = named(web.plan("/a.png", gives(PNG)))
    load(url)
    assert [path for path, *_ in web.requests] == ["/a.png"]


@pytest.mark.usefixtures("local_is_public")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (gives(bytes(20_000)), "more than 10 kB"),
        (gives(bytes(20_000), length=False), "more than 10 kB"),
        (repeats(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1000)), "more than 10 kB"),
        (repeats(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause=0.05), "cannot be fetched"),
        (repeats(b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n", pause=0.05), "cannot be fetched"),
        (gives(PNG, stops_after=200), "bytes early"),
        (gives(PNG, encoding="gzip"), "compresses it"),
        (gives(b"<html>"), "it is a web page"),
        (refuses(404), "the server says 404"),
        (refuses(500), "the server says 500"),
    ],
)
def test_an_address_without_an_image_is_refused_in_time(web, answer, message):
    start = time.monotonic()
    assert message in refusal(named(web.plan("/a.png", answer)), seconds=0.4)
    assert time.monotonic() - start < 10


def test_data_uris_are_decoded():
    assert loader().load(data_uri()).size == (40, 20)
    assert loader().load(data_uri().replace("data:image/png", "DATA:")).size == (40, 20)
    quoted = data_uri().replace("+", "%2B").replace("/", "%2F").replace("image%2Fpng", "image/png")
    assert loader().load(quoted).size == (40, 20)


def test_a_data_uri_of_the_most_bytes_is_read():
    content = PNG + bytes(10_000 - len(PNG))
    uri = f"data:;base64,{base64.b64encode(content).decode()}"
    assert loader().load(uri).size == (40, 30)
    larger = f"data:;base64,{base64.b64encode(content + bytes(9)).decode()}"
    with pytest.raises(DataError, match="more than 10 kB"):
        loader().load(larger)
