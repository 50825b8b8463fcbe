"""README.md, CONTRIBUTING.md and docs/: links, commands and style.

Claims: links, anchors, pictures and named files exist; commands use flags and configuration keys that exist; the front
page is short and shows motion; sentences are short and avoid the words that the glossary replaces.
"""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from pages import PAGES, ROOT, anchors, code_blocks, links, name, num_words, sentences, text_of
from PIL import Image

import inference
from pipeline.command_line import requested_videos, resolve_config

pages = pytest.mark.parametrize("page", PAGES, ids=name)
PACKAGES = (
    "benchmark",
    "configs",
    "docs",
    "evaluation",
    "live",
    "model",
    "pipeline",
    "scripts",
    "shapes",
    "tests",
    "trainer",
)
AVOIDED = ("lane", "lanes", "nobody", "knows", "wants", "who does what", "in disguise")


# ---- links and files ----


@pages
def test_links_lead_somewhere(page):
    for target in links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {target}, which has no such heading"


@pages
def test_named_files_exist(page):
    pattern = rf"\b((?:{'|'.join((*PACKAGES, 'utils', 'data'))})/[\w./*-]*\w\.(?:py|sh|yaml|md|txt|ipynb|csv|png))\b"
    for path in set(re.findall(pattern, text_of(page))):
        if "ode_pairs" not in path:  # made by a command
            assert [*ROOT.glob(path), *page.parent.glob(path)], f"{name(page)} names {path}"


def test_pages_show_exactly_the_pictures_in_the_folder():
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page) if "images/" in target}
    kept = {path.resolve() for path in (ROOT / "docs/images").iterdir()}
    assert shown == kept


# ---- commands ----


@pages
def test_commands_use_flags_and_keys_that_exist(page):
    for command in commands(page):
        words = shlex.split(command, comments=True)
        script = next((word for word in words if word.endswith(".py") and "=" not in word), None)
        if words[:1] == ["make"] and len(words) > 1:
            assert re.search(rf"^{words[1]}:", text_of(ROOT / "Makefile"), re.MULTILINE), command
        if script is None or not words[0].endswith(("python", "torchrun", "time")):
            continue
        assert (ROOT / script).is_file(), command
        for word in words[words.index(script) + 1 :]:
            if word.startswith("--"):
                assert word.partition("=")[0] in flags(script), f"{name(page)}: {word} of {script}"
            elif match := re.match(r"([a-z]+)\.([a-z_]+)=", word):
                assert match[2] in keys().get(match[1], ()), f"{name(page)}: {word}"


def test_commands_of_the_readme_resolve_their_configuration(monkeypatch):
    found = [shlex.split(command) for command in commands(ROOT / "README.md") if "python inference.py" in command]
    assert len(found) == 3
    for words in found:
        monkeypatch.setattr("sys.argv", words[words.index("inference.py") :])
        arguments = inference.parse_arguments()
        assert resolve_config(arguments).video.num_output_frames == 81
        assert requested_videos(arguments, None) and arguments.output_folder


def commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, continued lines joined."""
    lines = [line for block in code_blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    starts = ("make ", "python ", "torchrun ", ".venv/bin/python ", "time python ")
    return [line.strip() for line in lines if line.strip().startswith(starts) and "..." not in line]


@cache
def flags(script: str) -> set[str]:
    """Return the flags of a script's parser, and of the parsers of local modules that it imports.

    A computed flag, f"--{name}", stands for all keys of these files' dictionaries.
    """
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    files = [ROOT / script, *(ROOT / f"{module.replace('.', '/')}.py" for module in imported)]
    nodes = [n for file in files if file.is_file() for n in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    names = [argument for call in calls for argument in call.args]
    result = {"--help", *(n.value for n in names if isinstance(n, ast.Constant) and str(n.value).startswith("--"))}
    if any(isinstance(n, ast.JoinedStr) for n in names):
        keys = [key for n in nodes if isinstance(n, ast.Dict) for key in n.keys]
        result |= {f"--{key.value}" for key in keys if isinstance(key, ast.Constant)}
    return result


@cache
def keys() -> dict[str, set[str]]:
    """Return the keys of every section of the configuration."""
    from utils.config import Config

    return {section: set(vars(value)) for section, value in vars(Config()).items()}


# ---- the front page ----


def test_the_python_snippet_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [snippet] = code_blocks(ROOT / "README.md", "python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["x.mp4"]


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").split()) <= 1200


def test_the_first_screen_shows_motion_figures_commands_and_python():
    first_screen = "\n".join(text_of(ROOT / "README.md").splitlines()[:45])
    assert first_screen.index("teaser.webp") < first_screen.index("make demo    #")
    [snippet] = code_blocks(ROOT / "README.md", "python")
    assert snippet in first_screen and len(snippet.strip().splitlines()) <= 6
    assert first_screen.count("\n| ") == 4  # a heading and three figures


def test_the_moving_picture_moves_and_loads_fast():
    file = ROOT / "docs/images/teaser.webp"
    assert file.stat().st_size < 2_000_000
    with Image.open(file) as picture:
        assert picture.is_animated and picture.n_frames > 40


def test_the_citation_is_complete():
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "license", "references"} <= citation.keys()
    cited = {reference["identifiers"][0]["value"].removeprefix("arXiv:") for reference in citation["references"]}
    assert cited <= set(re.findall(r"\d{4}\.\d{5}", text_of(ROOT / "docs/method.md")))


# ---- prose ----


@pages
def test_sentences_are_short(page):
    lengths = [num_words(sentence) for sentence in sentences(page)]
    assert sum(lengths) / max(1, len(lengths)) <= 16


@pages
def test_words_are_those_of_the_glossary(page):
    found = [word for word in AVOIDED if re.search(rf"\b{re.escape(word)}\b", text_of(page))]
    assert not found
