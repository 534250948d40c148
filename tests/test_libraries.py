"""Imports of the large libraries: without garbage collection, and only what is needed."""

import ast
import gc
import importlib
import inspect
import subprocess
import sys

import pytest

from qwenvl_lit.__main__ import COMMANDS
from qwenvl_lit.libraries import LARGE, import_libraries

COMMANDS_IMPORT = (
    "import qwenvl_lit.api, qwenvl_lit.build, qwenvl_lit.cli.memory_check, "
    "qwenvl_lit.models.qwen_vl.family, sys"
)
# Libraries that only some runs need; two of them take seconds.
LATE = {"peft", "bitsandbytes", "torch._inductor.compile_fx", "transformers.trainer"}
LATE |= {"pandas", "datasets", "tensorboard", "wandb", "onnx", "IPython"}


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


@pytest.fixture
def write_library(tmp_path, monkeypatch, unfrozen):
    """Returns a function that writes a module, which the test can import."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def test_nothing_is_collected_while_libraries_are_imported(write_library):
    name = write_library("large_library", "import gc; collected = gc.isenabled()")
    import_libraries([name])
    assert not sys.modules[name].collected
    assert gc.isenabled()


def test_objects_are_frozen_only_if_nothing_was_imported_before(write_library):
    first, second = write_library("first_library", ""), write_library("second_library", "")
    before = gc.get_freeze_count()
    import_libraries([first])
    frozen = gc.get_freeze_count()
    assert frozen > before
    import_libraries([first, second])
    assert second in sys.modules
    assert gc.get_freeze_count() <= frozen


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_goes_on_as_before_also_after_an_error(enabled, write_library):
    name = write_library("broken_library", "raise ImportError('broken')")
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError, match="broken"):
            import_libraries([name])
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_command_imports_no_library_that_only_some_runs_need():
    script = f"{COMMANDS_IMPORT}; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    imported = set(process.stdout.split())
    assert {"qwenvl_lit.build", *LARGE} <= imported
    assert not imported & LATE


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_import_the_libraries_before_anything_that_needs_them(command):
    module = importlib.import_module(f"qwenvl_lit.{command}")
    statements = (
        ast.parse(inspect.getsource(getattr(module, "serve_here", module.main))).body[0].body
    )
    texts = [ast.unparse(statement) for statement in statements]
    imported = [text for text in texts if text.startswith(("import ", "from "))]
    assert imported
    assert texts.index("import_libraries()") < texts.index(imported[0])
