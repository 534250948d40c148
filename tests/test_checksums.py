import hashlib
import subprocess
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from qwenvl_lit import checksums
from qwenvl_lit.callbacks.checkpoint import AtomicCheckpointIO
from qwenvl_lit.types import DataError

STATE = {"state_dict": {"model.weight": torch.arange(5000.0)}, "config": {"seed": 1}}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    save_file({"a": torch.ones(300)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(300)}, folder / "model-00002-of-00002.safetensors")
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    (folder / "config.json").write_text("{}")
    checksums.write_sums(folder)
    return folder


def flip(path, position):
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_a_sealed_checkpoint_is_read_as_before(checkpoint):
    checksums.verify(checkpoint)
    for mmap in (True, False):
        stored = torch.load(checkpoint, weights_only=True, mmap=mmap)
        assert stored["state_dict"]["model.weight"].equal(STATE["state_dict"]["model.weight"])
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.comment.startswith(b"sha256:")
        assert archive.testzip() is None


def test_the_checksum_covers_what_torch_has_written(checkpoint, tmp_path):
    plain = tmp_path / "plain"
    with plain.open("wb") as file:
        torch.save(STATE, file)
    sealed, unsealed = checkpoint.read_bytes(), plain.read_bytes()
    assert sealed[: len(unsealed) - 2] == unsealed[:-2]
    assert sealed.endswith(hashlib.sha256(unsealed).hexdigest().encode())


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_flipped_bit_of_a_checkpoint_is_one_line(checkpoint, part):
    flip(checkpoint, int(part * checkpoint.stat().st_size))
    with pytest.raises(DataError) as error:
        checksums.verify(checkpoint)
    line = str(error.value)
    assert line.startswith(f"{checkpoint} is damaged: its sha256 is ")
    assert (
        "copy it again, or use another checkpoint of the run. To use it anyway: verify=false"
        in line
    )
    assert "\n" not in line


def test_a_flipped_bit_in_the_checksum_itself_is_found(checkpoint):
    flip(checkpoint, -3)
    with pytest.raises(DataError, match="is damaged"):
        checksums.verify(checkpoint)


def test_a_second_name_and_a_copy_carry_the_checksum(checkpoint, tmp_path):
    (tmp_path / "step_000001.ckpt").hardlink_to(checkpoint)
    (tmp_path / "copy.ckpt").write_bytes(checkpoint.read_bytes())
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, checkpoint)
    for name in ("step_000001.ckpt", "copy.ckpt", "last.ckpt"):
        checksums.verify(tmp_path / name)
    flip(tmp_path / "copy.ckpt", 3000)
    with pytest.raises(DataError, match="is damaged"):
        checksums.verify(tmp_path / "copy.ckpt")


@pytest.mark.parametrize("content", [b"", b"x", b"x" * 500, b"PK\5\6" + b"x" * 89])
def test_a_file_without_a_checksum_is_not_verified(tmp_path, content):
    (tmp_path / "old.ckpt").write_bytes(content)
    checksums.verify(tmp_path / "old.ckpt")
    torch.save(STATE, tmp_path / "torch.ckpt")
    flip(tmp_path / "torch.ckpt", 3000)
    checksums.verify(tmp_path / "torch.ckpt")
    checksums.verify(tmp_path)
    checksums.verify(tmp_path / "missing")


def test_a_stopped_write_leaves_the_checkpoint_before(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()

    def stop(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums.Writer, "write", stop)
    with pytest.raises(DataError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(STATE, checkpoint)
    assert checkpoint.read_bytes() == before
    checksums.verify(checkpoint)


def test_sums_are_those_of_sha256sum(folder):
    names = sorted(
        line.split("  ")[1] for line in (folder / checksums.SUMS).read_text().split("\n")[:-1]
    )
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "qwen.tiktoken",
    ]
    subprocess.run(["sha256sum", "-c", checksums.SUMS], cwd=folder, check=True, capture_output=True)


def test_a_flipped_bit_in_a_folder_names_the_file(folder):
    checksums.verify(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    flip(shard, -5)
    for path in (folder, shard):
        with pytest.raises(
            DataError, match=r"00002-of-00002\.safetensors is damaged: .*SHA256SUMS"
        ):
            checksums.verify(path)
    checksums.verify(folder / "model-00001-of-00002.safetensors")
    (folder / checksums.SUMS).unlink()
    checksums.verify(folder)


def test_the_files_of_a_folder_are_hashed_at_the_same_time(folder, monkeypatch):
    both_started = threading.Barrier(2, timeout=20)
    hash_file = checksums._sha256

    def hash_shard(file):
        if file.suffix == ".safetensors":
            both_started.wait()
        return hash_file(file)

    monkeypatch.setattr(checksums, "available_cores", lambda: 2)
    monkeypatch.setattr(checksums, "_sha256", hash_shard)
    checksums.verify(folder)


def test_text_files_of_a_folder_may_be_edited(folder):
    (folder / "config.json").write_text('{"changed": true}')
    checksums.verify(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\0",
        b"no sums\n\n",
        b"0" * 64 + b"  ../outside\n",
        b"0" * 64 + b"  missing.safetensors\n",
        b"0" * 3_000_000,
    ],
)
def test_sums_of_others_are_ignored_as_far_as_they_say_nothing(folder, text):
    (folder.parent / "outside").write_text("another file")
    (folder / checksums.SUMS).write_bytes(text)
    checksums.verify(folder)


def test_a_verified_file_is_read_again_only_if_it_has_changed(checkpoint, monkeypatch):
    checksums.verify(checkpoint)
    read = []
    original = checksums._sha256
    monkeypatch.setattr(checksums, "_sha256", lambda file: read.append(file) or original(file))
    checksums.verify(checkpoint)
    assert read == []
    AtomicCheckpointIO().save_checkpoint({**STATE, "more": 1}, checkpoint)
    checksums.verify(checkpoint)
    assert read == [checkpoint]


def test_other_ranks_of_a_machine_leave_it_to_the_first(checkpoint, monkeypatch):
    flip(checkpoint, 3000)
    monkeypatch.setenv("LOCAL_RANK", "1")
    checksums.verify(checkpoint)
