"""Objects that are built from a composed config, and what a command does before."""

import logging
import os
import warnings

from commands import compose_config

from qwenvl_lit import build


def test_warnings_of_libraries_are_log_lines(caplog, capsys):
    with warnings.catch_warnings():
        build.start(compose_config("train"))
        warnings.simplefilter("always")
        warnings.warn("two\n  lines", FutureWarning, stacklevel=1)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.name == "FutureWarning"
    assert record.getMessage().startswith("two lines (test_build.py:")
    assert capsys.readouterr().err == ""


def test_compiled_kernels_are_kept_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored after the test
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    build.start(compose_config("train", f"paths.cache={tmp_path}"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels")
    build.start(compose_config("train", "paths.cache=elsewhere"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels")


def test_a_logits_processor_is_built_from_the_config():
    processor = "{_target_:transformers.NoRepeatNGramLogitsProcessor,ngram_size:3}"
    config = compose_config("train", "data=jsonl", f"generation.logits_processor={processor}")
    assert build.generation(config).logits_processor.ngram_size == 3
    config = compose_config("train", "data=jsonl")
    assert build.generation(config).logits_processor is None
