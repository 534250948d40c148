"""The layers of the package as data, and the rules that follow from them for every module."""

import ast
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qwenvl_lit"
COMMANDS = {"train", "test", "predict", "chat", "serve", "check", "export", "__main__"}

LAYERS = [  # a module imports from the rows above its own, and from its own folder
    {  # single modules; they alone may import others of their row
        "types",
        "grounding",
        "atomic",
        "bounds",
        "cores",
        "locks",
        "images",
        "checksums",
        "terminal",
        "stored_files",
        "value_types",
        "stopping",
        "extras",
        "settings",
        "libraries",
    },
    {"models"},
    {"data", "metrics", "generation", "rendering"},
    {"training"},
    {"callbacks", "runs", "sweep"},
    {"reports", "build", "cli"},
    {"api"},
    {"evaluation", "serving"},
    COMMANDS,
]
# Libraries of the extras `serve` (pydantic, starlette and anyio come with fastapi) and `vllm`
SERVING = {"fastapi", "starlette", "pydantic", "anyio", "uvicorn", "prometheus_client", "vllm"}
# What a module may import at its start besides, because only the library of an extra imports it.
OF_EXTRAS = {"evaluation.lmms.model": {"lmms_eval", "tqdm"}}
ALLOWED_IN = {  # library -> where it may be imported; a library not listed may be anywhere
    "hydra": {"build", "cli", "evaluation.benchmarks", "runs", "sweep"}
    | {"train", "test", "predict", "serve"},
    "omegaconf": {"build", "cli", "evaluation", "runs", "sweep"} | COMMANDS,
    "lightning": {"data.datamodule", "data.loop_state", "training", "callbacks", "build", "cli"}
    | {"evaluation.sets", "train", "test", "predict"},
    "peft": {"training.adapters.methods", "training.adapters.peft_files"},
    "tiktoken": {"models"},
    "lmms_eval": {"evaluation.lmms.plugin", "evaluation.lmms.model"},
    **{library: {"serving"} for library in SERVING},
}
STARTS_FAST = COMMANDS | {  # modules that import nothing heavy before a command needs it
    "cli.command",
    "cli.early_checks",
    "cli.ranks",
    "cli.resume",
    "cli.run_folder",
    "cli.signals",
    "extras",
    "libraries",
    "settings",
    "stopping",
    "cores",
    "locks",
    "runs.config_folder",
    "runs.predictions",
    "runs.run",
    "runs.stored_config",
    "runs.versions",
    "sweep.results",
    "sweep.sweep",
    "types",
}
HEAVY = {"torch", "lightning", "transformers", "peft", "torchmetrics", "matplotlib", "numpy"}
NETWORK = {  # modules of models/qwen_vl that need torch, transformers and `SHARED` only
    *("network", "language", "vision", "config", "flops", "decoder"),
    *("dynamic_ntk", "image_tokens", "initialization"),
}
SHARED = {  # modules of models/ that know no family, and need torch and transformers only
    *("models.dequantized", "models.dynamo", "models.host_copy", "models.segments"),
    *("models.feature_cache", "models.kv_cache", "models.passes", "models.running_rows"),
    *("models.static_decoder", "models.cuda_graphs", "models.training_passes"),
}
ROOT_NAMES = {"__version__", "__all__", "__getattr__"}  # what qwenvl_lit/__init__.py defines
IMPORT_NAMES = {"hydra-core": "hydra", "pillow": "PIL"}  # where they differ from the library's


def name_of(path: Path) -> str:
    """The dotted name of a module within the package; that of a folder for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ROOT = PACKAGE / "__init__.py"
MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != ROOT}
INIT_FILES = sorted(PACKAGE.rglob("__init__.py"))


def member_of_layer(module: str) -> str:
    """The name that `LAYERS` lists: the module itself, or the folder at the top that holds it."""
    return module.split(".")[0]


def family_of(module: str) -> str | None:
    """The folder of models/ that holds a module; None for a module outside of all families."""
    folders = module.split(".")[:-1] if MODULES[module].name != "__init__.py" else module.split(".")
    return folders[1] if folders[:1] == ["models"] and len(folders) > 1 else None


def layer_of(module: str) -> int:
    member = member_of_layer(module)
    return next(level for level, members in enumerate(LAYERS) if member in members)


def imported_names(path: Path, *, at_start_only: bool = False) -> set[str]:
    """Dotted names that a file imports.

    `at_start_only` leaves out imports inside functions and under TYPE_CHECKING.
    """
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if at_start_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def libraries(path: Path) -> set[str]:
    """Top-level packages that a file imports when it is itself imported."""
    return {name.split(".")[0] for name in imported_names(path, at_start_only=True)}


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    modules = set()
    for name in imported_names(path):
        if not name.startswith("qwenvl_lit."):
            continue
        module = name.removeprefix("qwenvl_lit.")
        while module and module not in MODULES:  # the name of a class or function in a module
            module = module.rpartition(".")[0]
        modules |= {module} - {""}
    return modules


def defined_names(statements: list[ast.stmt]) -> set[str]:
    """What statements add to a module besides a docstring and imports: names, or else source."""
    names = set()
    for statement in statements:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant(str())):
                pass
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                names |= defined_names(statement.body)
            case ast.Assign(targets=[ast.Name(name)]) | ast.FunctionDef(name=name):
                names.add(name)
            case _:
                names.add(ast.unparse(statement))
    return names


def declared_libraries() -> set[str]:
    """Import names of the libraries that pyproject.toml requires."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]]
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_every_module_has_a_layer():
    assert {member_of_layer(module) for module in MODULES} == set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_layers_only(module):
    layer = layer_of(module)
    for other in imported_modules(MODULES[module]):
        same_folder = member_of_layer(other) == member_of_layer(module)
        assert same_folder or layer == layer_of(other) == 0 or layer_of(other) < layer, (
            f"{module} (layer {layer}) imports {other} (layer {layer_of(other)})"
        )


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_imported_only_where_it_may_be(module):
    for name in imported_names(MODULES[module]):
        allowed = ALLOWED_IN.get(name.split(".")[0])
        assert allowed is None or {module, member_of_layer(module)} & allowed, (
            f"{module} imports {name}"
        )


def test_the_network_needs_nothing_else_of_the_package():
    for name in NETWORK:
        imported = imported_modules(MODULES[f"models.qwen_vl.{name}"])
        needed = {other.removeprefix("models.qwen_vl.") for other in imported}
        assert needed <= NETWORK | SHARED, name


def test_a_family_and_what_families_share_import_no_other_family():
    """What families share is in the modules of models/ itself, which import no family."""
    for module, path in MODULES.items():
        if not module.startswith("models."):
            continue
        imported = {family_of(other) for other in imported_modules(path)}
        assert imported <= {None, family_of(module)}, module


def test_there_are_no_import_cycles():
    graph = {module: imported_modules(path) - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # its CycleError names the modules of a cycle


@pytest.mark.parametrize("module", sorted(STARTS_FAST))
def test_the_command_line_starts_without_heavy_imports(module):
    assert not libraries(MODULES[module]) & HEAVY


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_at_most_450_lines(module):
    assert len(MODULES[module].read_text().splitlines()) <= 450


@pytest.mark.parametrize("path", INIT_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_an_init_file_holds_no_code(path):
    """A docstring, imports and `__all__` only; the root also loads `QwenVL` lazily."""
    allowed = ROOT_NAMES if path == ROOT else {"__all__"}
    assert defined_names(ast.parse(path.read_text()).body) <= allowed


def test_only_required_libraries_are_imported_at_start():
    # numpy comes with torch.
    known = {"qwenvl_lit", "numpy", *declared_libraries(), *sys.stdlib_module_names}
    for module, path in MODULES.items():
        of_extra = OF_EXTRAS.get(module, set())
        if member_of_layer(module) == "serving":
            of_extra = SERVING
        assert libraries(path) <= known | of_extra, module
