"""Imports between packages go one way. Modules of model/ import neither torch.distributed nor the configuration."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each package with the packages that it may import.
LAYERS: dict[str, set[str]] = {
    "utils": set(),
    "model": {"utils"},
    "pipeline": {"utils", "model"},
    "trainer": {"utils", "model", "pipeline"},
    "evaluation": {"utils"},
    "shapes": {"utils", "model", "trainer", "evaluation"},
    "live": {"utils", "model", "pipeline"},
}
LAYERS["benchmark"] = {*LAYERS}
LAYERS["scripts"] = {*LAYERS}
COMMANDS = {"train", "inference", "demo"}
PROJECT = {*LAYERS, *COMMANDS, "tests"}
FILES = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]
FILES += [ROOT / f"{name}.py" for name in sorted(COMMANDS)]


def imported(source: str) -> Iterator[str]:
    """Return the full names of all modules and objects that a source imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden_imports(source: str, layer: str) -> list[str]:
    """Return the imports of this repository in `source` that its layer may not have."""
    allowed = LAYERS.get(layer, set(LAYERS)) | {layer}
    return [name for name in imported(source) if (top := name.split(".")[0]) in PROJECT and top not in allowed]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    layer = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert forbidden_imports(file.read_text(), layer) == []


def test_every_package_is_checked():
    packages = {folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists()}
    assert packages == set(LAYERS)


def test_a_forbidden_import_is_detected():
    source = "import json, trainer.losses\ndef f():\n    from pipeline.rollout import Rollout\nfrom utils import rng\n"
    assert forbidden_imports(source, "model") == ["trainer.losses", "pipeline.rollout.Rollout"]
    assert forbidden_imports(source, "scripts") == []
    assert forbidden_imports("from shapes import world", "trainer") == ["shapes.world"]


@pytest.mark.parametrize("file", sorted((ROOT / "model").glob("*.py")), ids=lambda file: file.name)
def test_model_code_imports_no_ranks_and_no_configuration(file):
    assert not [
        n
        for n in imported(file.read_text())
        if n.startswith(("torch.distributed", "utils.config", "utils.distributed", "utils.process_group"))
    ]
