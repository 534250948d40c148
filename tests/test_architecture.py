"""The layers, as data: a module imports only from lower layers, and some libraries only in some places."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qwenvl_lit"

LAYERS = [  # a module imports from the rows above its own, and from its own folder
    {"types", "grounding", "atomic"},  # plain modules; these alone may import each other
    {"models"},
    {"data", "metrics", "generation", "rendering"},
    {"training"},
    {"callbacks", "runs", "sweep"},
    {"reports", "build", "cli"},
    {"api", "evaluation"},
    {"train", "test", "predict", "chat", "check", "export", "__main__"},
]
ALLOWED_IN = {  # third-party package -> where it may be imported
    "hydra": {"build", "cli", "evaluation.benchmarks", "runs", "sweep"}
    | {"train", "test", "predict"},
    "omegaconf": {"build", "cli", "evaluation", "runs", "sweep"}
    | {"train", "test", "predict", "chat", "check", "export", "__main__"},
    "lightning": {"data.datamodule", "data.loop_state", "training", "callbacks", "build", "cli"}
    | {"evaluation.sets", "train", "test", "predict"},
    "peft": {"training.adapters.methods", "training.adapters.peft_files"},
    "tiktoken": {"models"},
}
STARTS_FAST = {  # at import time, nothing heavy
    "cli.command",
    "cli.ranks",
    "cli.resume",
    "runs.predictions",
    "runs.run",
    "runs.versions",
    "sweep.results",
    "sweep.sweep",
    "types",
    "train",
    "test",
    "predict",
    "chat",
    "check",
    "export",
    "__main__",
}
LIFTED_OUT = {  # of models/qwen_vl: torch and transformers only
    *("network", "language", "vision", "config", "flops"),
    *("dynamic_ntk", "image_tokens", "initialization"),
}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


def unit(module: str) -> str:
    """The name that `LAYERS` lists: the module itself, or its package."""
    listed = set().union(*LAYERS)
    return module if module in listed else module.split(".")[0]


def layer(module: str) -> int:
    return next(level for level, units in enumerate(LAYERS) if unit(module) in units)


def imports(path: Path, *, at_start_only: bool = False) -> set[str]:
    """Dotted names that a file imports; `at_start_only` leaves out those inside functions and under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_start_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    known = modules()
    found = set()
    for name in imports(path):
        name = name.removeprefix("qwenvl_lit.") if name.startswith("qwenvl_lit.") else ""
        while name and name not in known:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


def test_every_module_has_a_layer():
    assert {unit(module) for module in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_from_lower_layers_only(module):
    for other in ours(modules()[module]):
        same_folder = unit(other) == unit(module) or layer(module) == 0
        assert same_folder or layer(other) < layer(module), (
            f"{module} (layer {layer(module)}) imports {other} (layer {layer(other)})"
        )


@pytest.mark.parametrize("module", modules())
def test_libraries_stay_where_they_belong(module):
    for name in imports(modules()[module]):
        allowed = ALLOWED_IN.get(name.split(".")[0])
        assert allowed is None or module in allowed or unit(module) in allowed, (
            f"{module} imports {name}"
        )


def test_the_network_could_be_lifted_out():
    for name in LIFTED_OUT:
        module = f"models.qwen_vl.{name}"
        needed = {other.removeprefix("models.qwen_vl.") for other in ours(modules()[module])}
        assert needed <= LIFTED_OUT, module


def test_there_are_no_import_cycles():
    graph = {module: ours(path) - {module} for module, path in modules().items()}
    while graph:
        free = [module for module, needs in graph.items() if not needs & set(graph)]
        assert free, f"cycle among {sorted(graph)}"
        for module in free:
            del graph[module]


@pytest.mark.parametrize("module", sorted(STARTS_FAST))
def test_the_command_line_starts_without_heavy_imports(module):
    heavy = {"torch", "lightning", "transformers", "peft", "torchmetrics", "matplotlib", "numpy"}
    assert not heavy & {
        name.split(".")[0] for name in imports(modules()[module], at_start_only=True)
    }


@pytest.mark.parametrize("module", modules())
def test_a_module_has_one_idea(module):
    assert len(modules()[module].read_text().splitlines()) <= 450


def test_only_declared_libraries_are_imported_at_start():
    declared = {"torch", "lightning", "transformers", "peft", "torchmetrics", "hydra", "omegaconf"}
    declared |= {
        "huggingface_hub",
        "PIL",
        "matplotlib",
        "rich",
        "tiktoken",
        "safetensors",
        "numpy",
        "filelock",
        "qwenvl_lit",
    }
    for module, path in modules().items():
        names = {name.split(".")[0] for name in imports(path, at_start_only=True)}
        assert names <= declared | set(sys.stdlib_module_names), module
