"""The records in benchmarks/."""

import json
import re
from pathlib import Path

import pytest
from records import record_option

RECORDS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.name)
def test_a_record_is_json_without_folders_of_the_machine(file):
    text = file.read_text(encoding="utf-8")
    json.loads(text)
    assert not re.findall(r"/(?:home|root|tmp|work|mnt|data)/\S*", text)


def test_the_command_of_a_record_names_its_file_in_benchmarks():
    assert record_option(Path("/tmp/out/train.json")) == "--record benchmarks/train.json"
    assert record_option(None, "train.json") == "--record benchmarks/train.json"
