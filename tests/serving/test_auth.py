import asyncio

import pytest

from qwenvl_lit.serving.auth import Keys, read_keys
from qwenvl_lit.types import DataError

KEYS = ("first-key-1", "second-key-2")


@pytest.mark.parametrize(
    ("header", "admitted"),
    [
        (b"Bearer first-key-1", True),
        (b"bearer second-key-2", True),
        (b"Bearer  first-key-1 ", True),
        (None, False),
        (b"", False),
        (b"Bearer", False),
        (b"Bearer ", False),
        (b"first-key-1", False),
        (b"Basic first-key-1", False),
        (b"Bearer first-key-1x", False),
        (b"Bearer first-key-", False),
        ("Bearer ключ".encode(), False),
    ],
)
def test_a_key_is_needed_as_it_is(header, admitted):
    assert Keys(KEYS).admit(header) is admitted
    assert Keys().admit(header)


def test_keys_are_lines_of_a_file(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("# of the page\nfirst-key-1\n\n  second-key-2  \n")
    assert read_keys(str(file)) == list(KEYS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no key in it"),
        ("# none\n", "there is no key in it"),
        ("good-key-1\nshort\n", "keys.txt:2: a key has at least 8"),
        ("one key of words\n", "keys.txt:1: a key"),
        ("alice: first-key-1\n", "keys.txt:1: .* names go into lines of their own, such as # al"),
        ("schlüssel-eins\n", "keys.txt:1: a key"),
    ],
)
def test_a_file_of_bad_keys_is_refused_by_line_and_keeps_its_secrets(tmp_path, content, message):
    file = tmp_path / "keys.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_keys(str(file))
    assert not any(line and line in str(error.value) for line in content.split("\n"))


@pytest.mark.parametrize("key", ["sk-my-secret", "1f.Zx0secretIt", "/RaG3secret+x="])
def test_a_key_in_place_of_the_file_is_not_printed(key):
    with pytest.raises(DataError, match=r"No such file.*path of a file") as error:
        read_keys(key)
    assert "secret" not in str(error.value)


def test_a_missing_file_is_named_with_what_names_it_and_where_it_is_sought(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = rf"^serve.keys=keys.txt cannot be read \(No such .*, seen from {tmp_path}$"
    with pytest.raises(DataError, match=message):
        read_keys("keys.txt")
    monkeypatch.setenv("QWENVL_LIT_KEYS", "/run/keys.txt")
    with pytest.raises(DataError, match=r"^QWENVL_LIT_KEYS=/run/keys.txt .* one key a line$"):
        read_keys("/run/keys.txt")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("first-key-1\n", encoding="utf-8-sig")
    assert read_keys(str(file)) == ["first-key-1"]


def test_only_the_api_needs_a_key(server, tmp_path):
    (tmp_path / "index.html").write_text("<p>page</p>")
    served = server(keys=KEYS, page=tmp_path)

    async def statuses(**headers):
        paths = ("/", "/health", "/metrics", "/v1/models", "/v1/nothing")
        async with served.client(headers=headers) as client:
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(statuses()) == [200, 200, 200, 401, 401]
    good = asyncio.run(statuses(Authorization="Bearer first-key-1"))
    assert good == [200, 200, 200, 200, 404]


def test_a_missing_key_has_an_openai_body_and_nothing_is_read(server):
    served = server(keys=KEYS)
    response = asyncio.run(served.post("/v1/chat/completions", content=b"{"))
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["code"], error["message"][:15]) == ("invalid_api_key", "a key is needed")
    response = asyncio.run(served.ask([], headers={"Authorization": "Bearer other-key"}))
    assert response.json()["error"]["message"].startswith("the key is wrong")
