"""The files around the package agree: workflow, version, changelog, citation, what is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from import_all import OF_EXTRAS, WITH_EXTRAS, modules

import qwenvl_lit
from qwenvl_lit.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
REQUIRED = {re.split(r"[<>=]", package)[0].replace("-", "_") for package in PROJECT["dependencies"]}
# The names that distributions are imported by, and what torch brings.
IMPORTED = REQUIRED | {"hydra", "numpy", "PIL", "qwenvl_lit"} | sys.stdlib_module_names


def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())


def test_the_workflow_runs_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    runs = []
    for job in workflow()["jobs"].values():
        runs += [step["run"] for step in job["steps"] if "run" in step]
    assert runs == [".ci/run", "make imports", "make docs"]
    for command in runs:
        program, _, target = command.partition(" ")
        assert target in targets if program == "make" else (ROOT / program).exists()


def test_the_workflow_imports_the_package_on_each_version_of_python():
    versions = workflow()["jobs"]["imports"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_issue_templates_have_what_github_needs(file):
    template = yaml.safe_load(file.read_text())
    if file.stem == "config":
        assert template == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(template)
    ids = [entry["id"] for entry in template["body"] if entry["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0


def test_version_changelog_and_citation_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == (qwenvl_lit.__version__, str(citation["date-released"]))
    assert citation["version"] == qwenvl_lit.__version__
    assert citation["license"] == PROJECT["license"]


def imported(body: list[ast.stmt]) -> Iterator[str]:
    """Names of packages that statements import when their module is imported."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ("body", "orelse", "handlers", "finalbody"):
                yield from imported(getattr(node, inner, []))


def test_modules_import_required_packages_only():
    """Those of `WITH_EXTRAS` also import packages of their extras; `make imports` imports all."""
    for name in modules():
        file = ROOT / name.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        allowed = IMPORTED
        if name.startswith(WITH_EXTRAS):
            allowed = IMPORTED | OF_EXTRAS | set(EXTRAS)
        found = set(imported(ast.parse(file.read_text()).body))
        assert found <= allowed, f"{name} imports {', '.join(found - allowed)}"


def test_a_wheel_has_every_folder_of_the_package_and_of_conf():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [*ROOT.glob("qwenvl_lit/**/*.*"), *ROOT.glob("conf/**/*.yaml")]
    folders = {file.parent.relative_to(ROOT) for file in files if file.suffix != ".pyc"}
    names = [".".join(folder.parts) for folder in sorted(folders)]
    names = [name if name.startswith("qwenvl_lit") else f"qwenvl_lit.{name}" for name in names]
    assert set(names) <= set(setuptools["packages"])
