"""The layers of the code: imports go one way, utils <- model <- pipeline <- trainer <- scripts and commands.

Also: model code is single-device code and knows no configuration.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["utils", "model", "pipeline", "trainer", "scripts"]
COMMANDS = ["train.py", "inference.py"]
FILES = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]
FILES += [ROOT / name for name in COMMANDS if (ROOT / name).exists()]


def imported(source: str) -> Iterator[str]:
    """Full names of all modules and objects that a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> int | None:
    top = name.split(".")[0]
    return LAYERS.index(top) if top in LAYERS else len(LAYERS) if top in ("train", "inference", "tests") else None


def wrong_ways(source: str, layer: int) -> list[str]:
    return [name for name in imported(source) if (of := layer_of(name)) is not None and of > layer]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    layer = layer_of(file.relative_to(ROOT).parts[0].removesuffix(".py"))
    assert layer is not None and wrong_ways(file.read_text(), layer) == []


def test_all_layers_are_looked_at():
    assert {file.relative_to(ROOT).parts[0] for file in FILES} >= {*LAYERS, "train.py"}


def test_a_wrong_way_is_noticed():
    source = "import json, trainer.losses\ndef f():\n    from pipeline.rollout import Rollout\nfrom utils import rng\n"
    assert wrong_ways(source, LAYERS.index("model")) == ["trainer.losses", "pipeline.rollout.Rollout"]
    assert wrong_ways(source, LAYERS.index("scripts")) == []


@pytest.mark.parametrize("file", sorted((ROOT / "model").glob("*.py")), ids=lambda file: file.name)
def test_model_code_knows_no_ranks_and_no_configuration(file):
    assert not [
        n
        for n in imported(file.read_text())
        if n.startswith(("torch.distributed", "utils.config", "utils.distributed", "utils.process_group"))
    ]
