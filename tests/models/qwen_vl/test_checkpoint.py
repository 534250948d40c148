"""Full models: how they are found, checked and loaded."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from qwenvl_lit.models.byte_pairs import TINY_VOCABULARY
from qwenvl_lit.models.checkpoint_files import find_checkpoint, missing_files
from qwenvl_lit.models.qwen_vl.checkpoint import QWEN_VL
from qwenvl_lit.models.qwen_vl.family import QwenVLFamily
from qwenvl_lit.models.qwen_vl.network import QwenVLForCausalLM
from qwenvl_lit.types import DataError
from scripts.make_checkpoint import write_checkpoint

TWO_LAYERS = {**CONFIG, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model() -> QwenVLForCausalLM:
    return QwenVLFamily(config=TWO_LAYERS, vocabulary="tiny").load()


@pytest.fixture(scope="module", params=["bin", "safetensors"])
def folder(request, model, tmp_path_factory) -> Path:
    """A checkpoint of several shards."""
    folder = tmp_path_factory.mktemp("checkpoints") / request.param
    write_checkpoint(model, TINY_VOCABULARY, folder, kind=request.param, shard_bytes=40_000)
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def assert_same(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def shard_of(folder: Path, tensor: str) -> Path:
    [index] = folder.glob("*.index.json")
    return folder / json.loads(index.read_text())["weight_map"][tensor]


def change(file: Path, edit) -> None:
    """Rewrites a shard after `edit(tensors)`."""
    is_safetensors = file.suffix == ".safetensors"
    stored = load_file(file) if is_safetensors else torch.load(file, weights_only=True)
    tensors = {name: tensor.clone() for name, tensor in stored.items()}
    edit(tensors)
    if is_safetensors:
        save_file(tensors, file)
    else:
        torch.save(tensors, file)


# -- folders --------------------------------------------------------------------------------------


def test_a_checkpoint_in_the_published_layout_loads_exactly(folder, model):
    assert len(list(folder.glob("*-of-*"))) > 3
    family = QwenVLFamily(path=str(folder))
    assert_same(family.load(), model)
    assert family.processor().max_window_size == 6144
    assert family.load().generation_config.top_p == 0.3


def test_weights_are_converted_to_the_requested_dtype(folder):
    loaded = QwenVLFamily(path=str(folder), dtype="bfloat16").load()
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


def test_a_folder_written_by_transformers_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "qwen.tiktoken").write_bytes(TINY_VOCABULARY.read_bytes())
    assert_same(QwenVLFamily(path=str(tmp_path)).load(), model)


def test_auto_classes_load_the_model_without_remote_code(folder, model):
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert AutoConfig.from_pretrained(folder).hidden_size == 32
    assert_same(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), model)


def test_the_window_size_of_the_checkpoint_is_used(copy):
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**settings, "max_window_size": 100}))
    assert QwenVLFamily(path=str(copy)).processor().max_window_size == 100
    assert QwenVLFamily(path=str(copy), max_window_size=50).processor().max_window_size == 50


def test_tensors_that_do_not_match_are_named_before_loading(copy):
    other_shape = {"transformer.ln_f.weight": torch.ones(7)}
    change(shard_of(copy, "transformer.ln_f.weight"), lambda tensors: tensors.update(other_shape))
    [index] = copy.glob("*.index.json")
    content = json.loads(index.read_text())
    first = content["weight_map"].pop("transformer.wte.weight")
    content["weight_map"]["transformer.h.9.ln_1.weight"] = first
    index.write_text(json.dumps(content))
    unexpected = {"transformer.h.9.ln_1.weight": torch.ones(32)}
    change(copy / first, lambda tensors: tensors.update(unexpected))
    with pytest.raises(DataError) as caught:
        QwenVLFamily(path=str(copy)).load()
    for message in (
        "missing 1: transformer.wte.weight",
        "unexpected 1: transformer.h.9.ln_1.weight",
        "of another shape 1: transformer.ln_f.weight (7,), expected (32,)",
        str(copy),
    ):
        assert message in str(caught.value)


def test_a_tensor_missing_from_its_shard_is_named(copy):
    shard = shard_of(copy, "transformer.ln_f.weight")
    change(shard, lambda tensors: tensors.pop("transformer.ln_f.weight"))
    with pytest.raises(DataError, match=rf"{shard.name} lacks transformer.ln_f.weight"):
        QwenVLFamily(path=str(copy)).load()


def test_a_broken_shard_is_named(copy):
    shard = shard_of(copy, "transformer.ln_f.weight")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{shard.name} cannot be read: .*is it complete"):
        QwenVLFamily(path=str(copy)).load()


def test_a_bin_file_with_code_is_refused(copy):
    class Evil:
        def __reduce__(self):
            return print, ("run!",)

    for file in copy.glob("*-of-*"):
        file.unlink()
    for file in copy.glob("*.index.json"):
        file.unlink()
    torch.save({"transformer.wte.weight": Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model\.bin cannot be read"):
        QwenVLFamily(path=str(copy)).load()


def test_missing_files_of_a_folder_are_named(copy):
    shard = shard_of(copy, "transformer.ln_f.weight")
    shard.unlink()
    (copy / "qwen.tiktoken").unlink()
    assert missing_files(copy, ["config.json", "qwen.tiktoken"]) == ["qwen.tiktoken", shard.name]
    with pytest.raises(DataError, match=rf"lacks qwen.tiktoken, {shard.name}"):
        find_checkpoint(str(copy), QWEN_VL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value, copy):
    shard = shard_of(copy, "transformer.h.1.attn.c_attn.bias")
    change(shard, lambda tensors: tensors["transformer.h.1.attn.c_attn.bias"][-1:].fill_(value))
    named = (
        rf"{shard.name}: transformer\.h\.1\.attn\.c_attn\.bias is not finite.*earlier checkpoint"
    )
    family = QwenVLFamily(path=str(copy))
    with pytest.raises(DataError, match=named):
        family.load()
    with pytest.raises(DataError, match=named):
        family.base_reader()("transformer.h.1.attn.c_attn.bias")
    with pytest.raises(DataError, match=r"c_attn\.bias is not finite"):
        QwenVLFamily(path=str(copy), device_map={"": "cpu"}).load()


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 123\n"


def test_git_lfs_pointers_and_halves_of_files_are_named(copy):
    for file in copy.iterdir():
        if file.name == "tokenizer_config.json":  # not read
            continue
        content = file.read_bytes()
        file.write_text(LFS_POINTER)
        with pytest.raises(
            DataError, match=rf"{file.name} cannot be read: it is a git-lfs pointer"
        ):
            QwenVLFamily(path=str(copy)).load()
        if file.suffix == ".json":
            file.write_bytes(content[: len(content) // 2])
            with pytest.raises(DataError, match=rf"{file.name} cannot be read: it is not JSON"):
                QwenVLFamily(path=str(copy)).load()
        file.write_bytes(content)


def change_config(folder: Path, **changes) -> None:
    """Changes settings of `config.json`; None removes one."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"config\.json is of another model, 'llama'; the model_type of"),
        (
            {"model_type": "qwen2_vl", "visual": None},
            r"another model, 'qwen2_vl'.*Qwen/Qwen-VL-Chat",
        ),
        ({"visual": None}, r"has no `visual`: it is of Qwen, a model without vision tower"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            r"with AWQ \(4 bits\), which is not read; take .*Qwen-VL-Chat, with model.load_in_4bit",
        ),
    ],
)
def test_the_config_of_another_model_is_named(changes, message, copy):
    change_config(copy, **changes)
    with pytest.raises(DataError, match=message):
        QwenVLFamily(path=str(copy)).load()
    (copy / "qwen.tiktoken").unlink()  # other models have another vocabulary
    with pytest.raises(DataError, match=message):
        find_checkpoint(str(copy), QWEN_VL)


def test_quantized_weights_are_named_if_the_config_does_not_say_so(copy):
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.0.attn.c_attn.qweight"] = torch.zeros(2, 2, dtype=torch.int32)

    shard = shard_of(copy, "transformer.h.0.attn.c_attn.weight")
    change(shard, quantize)
    [index] = copy.glob("*.index.json")
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.h.0.attn.c_attn.qweight"] = shard.name
    index.write_text(json.dumps(content))
    message = (
        r"are quantized \(transformer\.h\.0\.attn\.c_attn\.qweight\) by GPTQ or AWQ, but neither "
        r"config\.json nor quantize_config\.json says how, which is not read; take the checkpoint"
    )
    with pytest.raises(DataError, match=message):
        QwenVLFamily(path=str(copy)).load()
    (copy / "quantize_config.json").write_text(json.dumps({"bits": 3, "group_size": 128}))
    with pytest.raises(DataError, match=r"quantize_config\.json: .* with GPTQ to 3 bits, which is"):
        find_checkpoint(str(copy), QWEN_VL)


def test_a_path_that_is_neither_a_folder_nor_a_hub_name_is_refused():
    with pytest.raises(DataError, match="no folder, relative to"):
        find_checkpoint("./not/here", QWEN_VL)


def test_weights_can_be_distributed_and_offloaded(folder, model):
    on_cpu = ["transformer.wte", "transformer.h.0", "transformer.ln_f", "transformer.visual"]
    device_map = {**dict.fromkeys([*on_cpu, "lm_head"], "cpu"), "transformer.h.1": "disk"}
    distributed = QwenVLFamily(path=str(folder), device_map=device_map).load()
    assert distributed.hf_device_map["transformer.h.1"] == "disk"
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(distributed(ids).logits, model(ids).logits)


def test_random_weights_of_the_published_size_need_a_vocabulary():
    with pytest.raises(ValueError, match=r"model\.vocabulary=tiny"):
        _ = QwenVLFamily(path="Qwen/Qwen-VL-Chat", weights="random").config
    config = QwenVLFamily(path="Qwen/Qwen-VL-Chat", weights="random", vocabulary="tiny").config
    assert (config.vocab_size, config.hidden_size, config.visual["layers"]) == (151936, 4096, 48)
    options = {"weights": "random", "vocabulary": "tiny", "device_map": "auto"}
    with pytest.raises(ValueError, match="device_map is for checkpoints"):
        QwenVLFamily(path="Qwen/Qwen-VL-Chat", **options)


def test_random_weights_have_the_sizes_of_a_folder(folder, model):
    random = QwenVLFamily(path=str(folder), weights="random").load().state_dict()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in random.items()} == expected


# -- the hub --------------------------------------------------------------------------------------


class Hub(SimpleHTTPRequestHandler):
    """Enough of the hub for one repository, `someone/small`.

    With `breaks_after`, the connection breaks after so many bytes of each large file.
    """

    breaks_after: int | None = None
    requests: tuple[str, ...] = ()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        request = f"{self.command} {self.path} {self.headers.get('Range', '')}"
        type(self).requests += (request.strip(),)
        folder = Path(self.directory)
        sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        if self.path.startswith("/api/models/someone/small/tree/"):
            entries = []
            for name, size in sizes.items():
                entries.append({"type": "file", "path": name, "size": size, "oid": name})
            return self.send(entries, body=body)
        if self.path.startswith("/api/models/someone/small"):
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            info = {"id": "someone/small", "modelId": "someone/small", "sha": "a" * 40}
            return self.send({**info, "siblings": siblings}, body=body)
        file = folder / self.path.rpartition("/")[2]
        if not self.path.startswith("/someone/small/resolve/") or not file.exists():
            return self.send_error(404)
        content = file.read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if body and type(self).breaks_after is not None and len(content) > 20_000:
            self.wfile.write(content[start : start + type(self).breaks_after])
            return self.connection.close()
        if body:
            self.wfile.write(content[start:])

    def send(self, value: dict | list, *, body: bool) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub on this machine and an empty cache; returns the class of its request handler."""
    from huggingface_hub import constants

    handler = type("Answers", (Hub,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield handler
    server.shutdown()


def test_a_hub_name_is_downloaded_once_and_then_read_from_the_cache(hub, model, caplog):
    assert_same(QwenVLFamily(path="someone/small").load(), model)
    assert "downloading someone/small: 0.0 GB" in caplog.text
    hub.requests = ()
    assert_same(QwenVLFamily(path="someone/small", download=False).load(), model)
    assert hub.requests == ()


def test_without_download_the_error_says_what_to_fetch(hub):
    message = r"lacks config.json, qwen.tiktoken, the weights, and is not to be fetched"
    with pytest.raises(DataError, match=message) as caught:
        find_checkpoint("someone/small", QWEN_VL, download=False)
    assert "19.3 GB; fetch with:  hf download someone/small" in str(caught.value)
    assert hub.requests == ()


def test_offline_mode_is_respected(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="offline mode is on"):
        find_checkpoint("someone/small", QWEN_VL)
    assert hub.requests == ()


@pytest.fixture
def impatient(monkeypatch):
    """Downloads are retried at once, in small chunks; an incomplete chunk is not kept."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)


def test_a_broken_connection_is_resumed(hub, model, impatient):
    hub.breaks_after = 10_000
    assert_same(QwenVLFamily(path="someone/small").load(), model)
    assert any("bytes=10000-" in request for request in hub.requests)


def test_files_that_arrived_before_a_failed_download_are_kept(hub, model, impatient):
    hub.breaks_after = 0
    with pytest.raises(DataError, match="whose files are kept"):
        find_checkpoint("someone/small", QWEN_VL)
    assert any(request.startswith("GET") and "config.json" in request for request in hub.requests)
    hub.breaks_after, hub.requests = None, ()
    assert_same(QwenVLFamily(path="someone/small").load(), model)
    assert not any(
        request.startswith("GET") and "config.json" in request for request in hub.requests
    )


def test_another_quantization_on_the_hub_is_refused_before_its_weights_are_fetched(hub, folder):
    config = (folder / "config.json").read_text()
    try:
        change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
        with pytest.raises(DataError, match=r"with AWQ \(4 bits\), which is not read"):
            find_checkpoint("someone/small", QWEN_VL)
    finally:
        (folder / "config.json").write_text(config)
    assert not any("-of-" in request for request in hub.requests)


def test_an_unknown_hub_name_is_an_error(hub):
    with pytest.raises(
        DataError, match=r"someone/else is no folder, relative to .*, and could not be fetched"
    ):
        find_checkpoint("someone/else", QWEN_VL)
