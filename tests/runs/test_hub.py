"""Uploads to the Hugging Face Hub: the client is the real one, the Hub a local server."""

import huggingface_hub.constants
import pytest
from hub_server import READER, WRITER

from qwenvl_lit.runs.hub import find_repository
from qwenvl_lit.types import DataError


@pytest.fixture
def folder(tmp_path):
    """A folder with a card, a config, and two files that the Hub stores as large ones."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# mine\n")
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 2000)
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_repository_is_created_private_after_saying_what_is_uploaded(hub, folder):
    repository = find_repository("Ann/mine", private=True)
    assert not hub.repositories
    lines = repository.announcement(folder).splitlines()
    assert lines == [
        f"Uploading to {hub.address}/Ann/mine (new, private): 4 files, 4.04 kB",
        "  README.md  34 bytes",
        "  config.json  2 bytes",
        "  model-1.safetensors  2 kB",
        "  model-2.safetensors  2 kB",
        f"To repeat it after an interruption:  hf upload Ann/mine {folder} . --private",
    ]
    repository.upload(folder)
    assert hub.repositories["Ann/mine"] == {"private": True, "files": contents(folder)}


def test_the_upload_of_files_in_batches_arrives_too(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)  # the default
    hub.large = "none"
    find_repository("Ann/mine", private=True).upload(folder)
    assert hub.repositories["Ann/mine"]["files"] == contents(folder)


def test_a_repository_is_public_only_if_asked_for(hub, folder):
    repository = find_repository("Ann/mine", private=False)
    assert "(new, public)" in repository.announcement(folder)
    assert "--private" not in repository.repeat(folder)
    repository.upload(folder)
    assert hub.repositories["Ann/mine"]["private"] is False


def test_files_of_the_same_name_are_replaced_and_others_are_kept(hub, folder):
    old = {".gitattributes": b"", "README.md": b"old", "notes.txt": b"mine"}
    hub.repositories["Ann/mine"] = {"private": True, "files": dict(old)}
    repository = find_repository("Ann/mine", private=True)
    shown = repository.announcement(folder)
    assert "(exists, private)" in shown
    assert "README.md  34 bytes  (replaces)\n  config.json  2 bytes\n" in shown
    assert "  kept in the repository: notes.txt\n" in shown
    repository.upload(folder)
    assert hub.repositories["Ann/mine"]["files"] == {**old, **contents(folder)}
    assert not hub.sent("repos/create")


def test_what_has_arrived_of_an_interrupted_upload_is_not_sent_again(hub, folder):
    hub.refused = {"commit/main": (403, {"error": "Private storage is full"})}
    with pytest.raises(DataError) as error:
        find_repository("Ann/mine", private=True).upload(folder)
    message = str(error.value)
    assert "push=Ann/mine: the upload stopped: " in message
    assert "Private storage is full" in message
    assert message.endswith(f"repeats the upload:  hf upload Ann/mine {folder} . --private")
    assert "\n" not in message
    assert len(hub.sent("PUT /large/")) == 2
    hub.refused = {}
    find_repository("Ann/mine", private=True).upload(folder)
    assert len(hub.sent("PUT /large/")) == 2
    assert hub.repositories["Ann/mine"]["files"] == contents(folder)


@pytest.mark.parametrize("name", ["mine", "a/b/c", "Ann/", "Ann/my model", "Ann/..x", 5])
def test_a_name_that_is_no_repository_is_refused(hub, name):
    with pytest.raises(DataError, match=r"^push is owner/name, .* got "):
        find_repository(name, private=True)
    assert not hub.requests


SCOPED = {"fineGrained": {"scoped": [{"permissions": ["repo.content.read"]}]}}
FINE_GRAINED = {"accessToken": {"role": "fineGrained", **SCOPED}}
ORGANIZATIONS = [{"name": "Lab", "roleInOrg": "read"}, {"name": "Team", "roleInOrg": "write"}]


@pytest.mark.parametrize(
    ("name", "account", "message"),
    [
        ("Bob/mine", {}, "the token is of Ann, who may write to repositories of Ann, Lab, Team; "),
        ("Lab/mine", {}, "Ann may only read in this organization"),
        ("Ann/mine", {"auth": READER}, "the token may only read; make one that may write at"),
        ("Team/mine", {"auth": FINE_GRAINED}, "the token may only read"),
    ],
)
def test_an_account_that_may_not_write_is_refused(hub, name, account, message):
    known = {"name": "Ann", "orgs": ORGANIZATIONS, "auth": WRITER}
    hub.tokens["hf_ann"] = {**known, **account}
    with pytest.raises(DataError, match=f"^push={name}: {message}"):
        find_repository(name, private=True)
    assert hub.requests == ["GET /api/whoami-v2"]


@pytest.mark.parametrize("name", ["ann/mine", "Team/mine"])
def test_an_account_writes_to_its_own_repositories_and_those_of_its_organizations(hub, name):
    hub.tokens["hf_ann"]["orgs"] = ORGANIZATIONS
    assert find_repository(name, private=True).files is None


def test_without_a_token_the_login_is_named(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DataError, match=r"needs a token that may write: run hf auth login, or set"):
        find_repository("Ann/mine", private=True)


def test_a_token_that_the_hub_does_not_know_is_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(DataError, match=r"refuses: Invalid user token. The token from HF_TOKEN"):
        find_repository("Ann/mine", private=True)


def test_offline_mode_is_named(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"offline mode is on \(HF_HUB_OFFLINE\): unset it, or"):
        find_repository("Ann/mine", private=True)
    assert not hub.requests


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    hub.close()
    with pytest.raises(DataError, match=r"no network: .*refused.*proxy$"):
        find_repository("Ann/mine", private=True)


def test_a_repository_of_others_is_found_before_the_export(hub):
    hub.repositories["Ann/mine"] = {"private": True, "files": {}}
    hub.refused = {"auth-check/write": (403, {"error": "Forbidden: no write access"})}
    with pytest.raises(DataError, match=r"refuses: .*Forbidden: no write access") as error:
        find_repository("Ann/mine", private=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_not_used_if_others_can_see_it_against_the_setting(hub, private):
    hub.repositories["Ann/mine"] = {"private": not private, "files": {}}
    other = str(not private).lower()
    with pytest.raises(DataError, match=rf"choose another name, or push_private={other} to"):
        find_repository("Ann/mine", private=private)
