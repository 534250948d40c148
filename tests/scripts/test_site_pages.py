"""Pages of the documentation that are made from config files, records and other files."""

import importlib
import json
import re

import pytest
import yaml
from site_pages.benchmark_tables import RECORDS, TITLES, benchmarks_page, record_parts
from site_pages.config_keys import (
    CONF,
    config_pages,
    first_sentence,
    markdown_of,
    prefix_of,
    read_config,
    section,
)
from site_pages.python_api import SECTIONS, api_page
from site_pages.repository_files import COPIES, DOCS, GENERATED, ROOT, relinked

FILES = sorted(CONF.rglob("*.yaml"))


def values(node, prefix, shown):
    """Values of a yaml file by path; a mapping that is shown in one line is one value."""
    for key, value in node.items():
        path = "defaults" if key == "defaults" else f"{prefix}{key}"
        if isinstance(value, dict) and not shown.get(path):
            yield from values(value, f"{path}.", shown)
        else:
            yield path, value


@pytest.fixture(scope="module")
def pages():
    return config_pages()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_key_of_a_file_has_its_default(file):
    text = file.read_text()
    shown = {key.path: key.default for key in read_config(file).keys}
    expected = dict(values(yaml.safe_load(text), prefix_of(file, text), shown))
    assert expected.keys() == {path for path in shown if shown[path]}
    for path, value in expected.items():
        if not shown[path].startswith("|"):  # a text over several lines
            assert yaml.safe_load(shown[path]) == value, path


def test_every_file_is_on_a_page(pages):
    text = "\n".join(pages.values())
    for file in FILES:
        assert section(read_config(file)) in text
    assert all(f"\n{name}\n" in pages["config"] for name in pages if name != "config")


def test_comments_above_and_beside_a_key_belong_to_it():
    keys = {key.path: key for key in read_config(CONF / "data/jsonl.yaml").keys}
    bad_image = keys["data.on_bad_image"]
    assert bad_image.default == "error"
    assert bad_image.comment == ("drop: leave out rows that have an image that cannot be opened",)
    assert keys["data.on_bad_box"].comment[0].startswith("A box outside its image")
    assert keys["data.num_workers"].comment == ()
    memory = {key.path: key for key in read_config(CONF / "train.yaml").keys}["memory"]
    assert memory.comment[0].startswith("the memory per GPU is estimated")


def test_comments_become_paragraphs_lists_and_commands():
    comment = ["Text with _target_ and", "`a_b`.", "  keep   as is,", "         so", "  drop   x"]
    assert markdown_of(comment) == (
        "Text with \\_target\\_ and `a_b`.\n\n- `keep`: as is, so\n- `drop`: x"
    )
    assert markdown_of(["So:", "", "  data=jsonl a=*"]) == "So:\n\n```text\ndata=jsonl a=*\n```"
    assert first_sentence(["A, b. C", "", "D"]) == "A, b."


def test_every_record_is_on_the_page_with_its_conditions():
    page = benchmarks_page()
    for file in RECORDS.glob("*.json"):
        record = json.loads(file.read_text())
        assert f"`benchmarks/{file.name}`" in page
        if "command" in record:
            assert f"- Command: `{record['command']}`" in page
    assert all(f"## {title}" in page for title in TITLES.values())
    training = json.loads((RECORDS / "train.json").read_text())["results"]
    assert all(f"| {row['case']} |".replace("_", r"\_") in page for row in training)


def test_rows_of_a_record_become_a_table():
    rows = [{"rows": 1, "s": 0.25}, {"rows": 8, "s": None}]
    parts = record_parts("x", {"device": "A_1", "versions": {"torch": "2"}, "results": rows})
    assert parts[0] == "- File: `benchmarks/x.json`\n- Device: A\\_1\n- Versions: torch 2"
    assert parts[2] == "| rows | s |\n| --- | --- |\n| 1 | 0.25 |\n| 8 |  |"


def test_the_reference_names_what_exists():
    page = api_page()
    for part in SECTIONS:
        for module, names in part.names.items():
            for name in names:
                assert getattr(importlib.import_module(module), name).__doc__
                assert f"{module}.{name}" in page


def test_links_lead_to_pages_of_the_site():
    page = GENERATED / "readme.md"
    text = "[d](docs/data.md#x) [s](SECURITY.md) ![p](docs/car.png) [c](conf/) [w](https://a.b)"
    assert relinked(text, ROOT / "README.md", page) == (
        "[d](../data.md#x) [s](security.md) ![p](../car.png) c [w](https://a.b)"
    )
    here = DOCS / "reliability.md"
    assert relinked("[S](../SECURITY.md)", here, here) == "[S](generated/security.md)"
    assert relinked("[\\_" * 40, page, page) == "[\\_" * 40


def test_copied_files_and_listed_pages_exist():
    index = (DOCS / "index.md").read_text()
    for name in re.findall(r"<([\w/]+)>", index):
        if name.startswith("generated/"):
            known = {"config", "api", "benchmarks", *COPIES}
            assert name.removeprefix("generated/") in known
        else:
            assert (DOCS / f"{name}.md").exists()
    assert all(file.exists() for file in COPIES.values())


def test_the_navigation_has_every_page():
    index = (DOCS / "index.md").read_text()
    listed = set(re.findall(r"^[^|].* <(\w+)>$", index, re.MULTILINE))
    assert listed == {page.stem for page in DOCS.glob("*.md")} - {"index"}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_its_purpose_and_a_command(page):
    title, purpose, block = page.read_text().split("\n\n", 3)[:3]
    assert re.fullmatch(r"# .+", title)
    assert re.match(r"[\w`]", purpose)
    assert re.match(r"```(python)?\n", block)


def anchors(text):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_headings_that_exist():
    broken = []
    for page in [*DOCS.glob("*.md"), *ROOT.glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text()):
            file = page.parent / target if target else page
            if anchor not in anchors(file.read_text()):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert not broken
