import io
import multiprocessing
import zipfile

import pytest
from web_server import Server, gives

from qwenvl_lit.data import expansion
from qwenvl_lit.data.download.archives import Archive, ensure_unpacked
from qwenvl_lit.types import DataError


@pytest.fixture
def server():
    with Server() as server:
        yield server


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


VAL = zipped(
    **{
        "val/": "",
        "val/1.jpg": "one",
        "val/sub/2.jpg": "two",
        "notes/a.json": "{}",
        "notes/b.json": "[]",
    }
)


def archive_of(server, content=VAL, members=("val",)):
    url = server.plan("/val.zip", gives(content))
    return Archive(url=url, size=len(content), members=members)


def files(root):
    return {
        str(path.relative_to(root)): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".fetch.lock"
    }


def test_an_archive_is_fetched_unpacked_and_removed(server, tmp_path):
    archive = archive_of(server, members=("val", "notes/b.json"))
    ensure_unpacked([archive], tmp_path)
    assert files(tmp_path) == {"val/1.jpg": "one", "val/sub/2.jpg": "two", "notes/b.json": "[]"}
    ensure_unpacked([archive], tmp_path, download=False)
    assert len(server.requests) == 1


def test_an_archive_that_would_fill_the_disk_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(expansion, "ALWAYS_ALLOWED", 1_000_000)
    archive = archive_of(server, zipped(**{"val/1.jpg": " " * 5_000_000}))
    with pytest.raises(DataError, match=r"val\.zip expands to 5,000,000 bytes or more, over 200"):
        ensure_unpacked([archive], tmp_path)
    assert not (tmp_path / "val").exists()


def test_one_of_several_processes_downloads_it(server, tmp_path):
    archive = Archive(
        url=server.plan("/val.zip", gives(VAL, pauses=0.2)), size=len(VAL), members=("val",)
    )
    processes = [
        multiprocessing.get_context("fork").Process(
            target=ensure_unpacked, args=([archive], tmp_path)
        )
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(server.requests) == 1
    assert files(tmp_path) == {"val/1.jpg": "one", "val/sub/2.jpg": "two"}


def test_existing_members_stay_and_missing_ones_are_unpacked(server, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val/mine.jpg").write_text("mine")
    ensure_unpacked([archive_of(server, members=("val", "notes/a.json"))], tmp_path)
    assert files(tmp_path) == {"val/mine.jpg": "mine", "notes/a.json": "{}"}


def test_an_existing_archive_is_used_offline_and_kept(server, tmp_path):
    (tmp_path / "val.zip").write_bytes(VAL)
    ensure_unpacked([archive_of(server)], tmp_path, download=False)
    assert (tmp_path / "val/1.jpg").read_text() == "one"
    assert (tmp_path / "val.zip").exists()
    assert server.requests == []


def test_unpacking_resumes_where_it_stopped(server, tmp_path):
    stage = tmp_path / ".val.zip.part/val"
    stage.mkdir(parents=True)
    (stage / "1.jpg").write_text("from before")  # complete, since it has its name
    (stage / "sub").mkdir()
    (stage / "sub/2.jpg.part").write_text("t")
    ensure_unpacked([archive_of(server)], tmp_path)
    assert files(tmp_path) == {"val/1.jpg": "from before", "val/sub/2.jpg": "two"}


@pytest.mark.parametrize("name", ["val/../../evil", "val/C:evil", "val/..\\evil"])
def test_a_member_outside_the_folder_is_refused(server, tmp_path, name):
    content = zipped(**{"val/1.jpg": "one", name: "evil"})
    with pytest.raises(DataError, match="could write outside its folder"):
        ensure_unpacked([archive_of(server, content)], tmp_path / "root")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "root/val").exists()


def test_a_link_in_an_archive_is_refused(server, tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        link = zipfile.ZipInfo("val/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
    with pytest.raises(DataError, match="could write outside its folder"):
        ensure_unpacked([archive_of(server, file.getvalue())], tmp_path)


def test_nothing_is_unpacked_from_a_broken_archive(server, tmp_path):
    broken = bytearray(VAL)
    broken[broken.index(b"val/1.jpg") + 10] ^= 255
    with pytest.raises(
        DataError,
        match=r"val.zip is not a valid zip file: .*; remove it, and it is downloaded again",
    ):
        ensure_unpacked([archive_of(server, bytes(broken))], tmp_path)
    assert not (tmp_path / "val").exists()


def test_a_web_page_instead_of_an_archive_is_refused(server, tmp_path):
    with pytest.raises(DataError, match="File is not a zip file"):
        ensure_unpacked([archive_of(server, b"<html>sorry</html>")], tmp_path)


def test_an_archive_without_a_member_is_refused(server, tmp_path):
    with pytest.raises(DataError, match=r"val.zip has no train; is it the right archive"):
        ensure_unpacked([archive_of(server, members=("train",))], tmp_path)


def test_too_little_disk_space_is_refused_before_the_download(server, tmp_path):
    with pytest.raises(DataError, match=r"free, 1000000000.00 GB are needed; free disk space"):
        ensure_unpacked(
            [Archive(url=server.plan("/val.zip", gives()), size=10**18, members=("val",))], tmp_path
        )
    assert server.requests == []
