"""Change one expression of model/, pipeline/ or trainer/ at a time, and print the changes that no test notices.

    python tests/mutation/run.py                                      # a random sample of 30 mutants of each group
    python tests/mutation/run.py objectives trainer/ema.py --sample 0 # all mutants of a group and of a module
    python tests/mutation/run.py "trainer/ema.py#7"                   # one mutant

A copy of the repository under mutation/ is changed. First the group's tests run once unchanged, and coverage.py stores
the lines that each test and its fixtures execute. For each mutant, the tests that execute its line run in a forked
process, fastest first, until one fails. If none fails, all tests of the group run, because some start subprocesses that
execute the line. mutmut makes the mutants. It skips decorated functions; errors, assertions and help texts are skipped,
too.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from coverage import Coverage, CoverageData
from libcst import Module
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import Mutation, create_mutations

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mutation"
GROUPS: dict[str, tuple[list[str], list[str]]] = {  # modules, and the tests that run for their mutants
    "model": (
        ["model/*.py"],
        ["model/test_*.py", "bad_input/test_damaged_weights.py", "bad_input/test_model_folders.py"]
        + [f"pipeline/test_{name}.py" for name in ("bidirectional", "rollout", "teacher", "text_to_video")]
        + ["scripts/test_convert_checkpoint.py", "scripts/test_random_transformer.py"],
    ),
    "rollouts": (
        ["pipeline/rollout.py", "pipeline/schedule.py", "pipeline/training_rollout.py"],
        ["pipeline/test_rollout.py", "pipeline/test_schedule.py", "pipeline/test_training_rollout.py"],
    ),
    "pipeline": (["pipeline/*.py"], ["pipeline/test_*.py", "bad_input/test_records.py"]),
    "parallel": (["pipeline/parallel/*.py"], ["pipeline/parallel/test_*.py", "pipeline/test_text_to_video.py"]),
    "trainer": (
        ["trainer/*.py"],
        [f"trainer/test_{name}.py" for name in ("checkpoint_reader", "logging", "optim", "planner", "resume")]
        + [f"trainer/test_{name}.py" for name in ("score_distillation", "train_command", "trainer")]
        + ["utils/test_files.py"],
    ),
    "datasets": (
        ["trainer/datasets/*.py"],
        [f"trainer/test_{name}.py" for name in ("datasets", "order", "objectives", "own_videos", "training_scripts")]
        + ["trainer/test_score_distillation.py", "bad_input/test_ode_pairs.py", "model/test_mixkit.py"],
    ),
    "objectives": (
        ["trainer/objectives/*.py"],
        [f"trainer/test_{name}.py" for name in ("losses", "objectives", "score_distillation", "data_latents")],
    ),
}
LIBRARIES = (
    "torch.distributed.checkpoint torch.distributed.fsdp diffusers.models transformers.models.umt5 hypothesis av"
)
OPTIONS = ["-x", "-p", "no:cacheprovider", "-m", "not slow", "--timeout=300"]
DESELECT = "tests/pipeline/test_schedule.py::test_the_module_imports_no_torch"  # torch is imported here beforehand
MEMORY = 8 << 30  # bytes; a mutant that allocates without end fails
LATE = 124  # exit code of a run that takes too long


@dataclass(frozen=True)
class Mutant:
    """One changed expression in a function of a module."""

    file: str
    number: int
    lines: range  # of the innermost statement around the expression
    tree: Module
    change: Mutation

    @property
    def name(self) -> str:
        return f"{self.file}#{self.number}"

    def code(self) -> str:
        return self.tree.deep_replace(self.change.original_node, self.change.mutated_node).code  # type: ignore

    def diff(self) -> str:
        lines = difflib.unified_diff(self.tree.code.splitlines(), self.code().splitlines(), self.name, lineterm="", n=2)
        return "\n".join(lines)


def innermost(source: ast.Module, line: int) -> tuple[ast.stmt, range]:
    """Return the innermost statement that contains a line, and its lines without those of a nested block."""
    around = [
        node for node in ast.walk(source) if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno
    ]
    found = max(around, key=lambda node: (node.lineno, -node.end_lineno))
    end = found.body[0].lineno if hasattr(found, "body") else found.end_lineno + 1
    return found, range(found.lineno, max(end, found.lineno + 1))


def mutants(file: str) -> Iterator[Mutant]:
    """Return all mutants of a module that change what it computes."""
    text = Path(file).read_text(encoding="utf-8")
    source, lines = ast.parse(text), text.splitlines()
    tree, changes, *_ = create_mutations(file, text)
    positions = MetadataWrapper(tree, unsafe_skip_copy=True).resolve(PositionProvider)
    for number, change in enumerate(changes):
        place = positions.get(change.original_node)
        if change.contained_by_top_level_function is None or place is None:
            continue
        statement, around = innermost(source, place.start.line)
        if not isinstance(statement, ast.Raise | ast.Assert) and "help=" not in lines[place.start.line - 1]:
            yield Mutant(file, number, around, tree, change)


class Recorder:
    """A pytest plugin that stores the seconds and the fixtures of each test, and the lines that they execute."""

    def __init__(self, files: list[str]):
        self.coverage = Coverage(data_file="lines.coverage", include=files, messages=False)
        self.tests: dict[str, tuple[float, list[str]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.monotonic()
        result = yield
        self.tests[item.nodeid] = time.monotonic() - start, list(getattr(item, "fixturenames", ()))
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if fixturedef.scope != "function":  # several tests may use it
            self.coverage.switch_context(fixturedef.argname)
        result = yield
        self.coverage.switch_context(request._pyfuncitem.nodeid)
        return result

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        Path("tests.json").write_text(json.dumps(self.tests), encoding="utf-8")


@dataclass(frozen=True)
class Selection:
    """A pytest plugin that runs the named tests only, fastest first."""

    seconds: dict[str, float]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.seconds), key=lambda i: self.seconds[i.nodeid])


def run_tests(tests: set[str], plugin: Any, limit: float, start: Callable[[], None] = lambda: None) -> int:
    """Run tests in a forked process in the working directory, at most `limit` seconds; return pytest's exit code."""
    if not (child := os.fork()):
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        start()
        with tempfile.TemporaryDirectory() as temporary:
            words = [*OPTIONS, f"--basetemp={temporary}/t", f"--deselect={DESELECT}", *sorted(tests)]
            code = pytest.main(words, plugins=[plugin])
        os._exit(int(code))
    end = time.monotonic() + limit
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also processes that tests left behind
    if not done[0]:
        os.waitpid(child, 0)
        return LATE
    return os.waitstatus_to_exitcode(done[1])


def prepare(name: str) -> None:
    """Copy the repository to mutation/`name` and enter that folder."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in files.splitlines():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    (folder / "setup.cfg").write_text("[mutmut]\nsource_paths = .\n")
    os.chdir(folder)


class Coverages:
    """The tests of a group, and the lines that each executes."""

    def __init__(self, files: list[str], patterns: list[str]):
        recorder = Recorder(files)
        paths = {str(path) for pattern in patterns for path in Path("tests").glob(pattern)}
        if run_tests(paths, recorder, 7200, recorder.coverage.start):
            sys.exit(f"a test fails without a mutant:\n{Path('output.txt').read_text()[-3000:]}")
        self.tests: dict[str, tuple[float, list[str]]] = json.loads(Path("tests.json").read_text(encoding="utf-8"))
        self.data = CoverageData("lines.coverage")
        self.data.read()

    def tests_of(self, mutant: Mutant) -> dict[str, float]:
        """Return the tests that execute the mutant's lines, with their seconds; all if none does in this process."""
        contexts = self.data.contexts_by_lineno(str(Path(mutant.file).resolve()))
        executing = {context for line in mutant.lines for context in contexts.get(line, ())}
        chosen = {test for test, (_, fixtures) in self.tests.items() if not executing.isdisjoint([test, *fixtures])}
        return {test: self.tests[test][0] for test in chosen or self.tests}


def survives(mutant: Mutant, seconds: dict[str, float]) -> str:
    """Run tests of a mutant; return "killed", "killed late" (by the time limit) or "survived"."""
    file, original = Path(mutant.file), mutant.tree.code
    file.write_text(mutant.code(), encoding="utf-8")
    try:
        paths = {test.split("::")[0] for test in seconds}
        code = run_tests(paths, Selection(seconds), 120 + 10 * sum(seconds.values()))
        return "killed late" if code == LATE else "killed" if code else "survived"
    finally:
        file.write_text(original, encoding="utf-8")


def run_group(name: str, files: list[str], numbers: set[str], args: argparse.Namespace) -> Counter[str]:
    """Test the mutants of a group's modules, or a sample of them; print the survivors, and return the counts."""
    prepare(name)
    found = [mutant for file in files for mutant in mutants(file)]
    drawn = random.Random(args.seed).sample(found, min(args.sample or len(found), len(found)))
    drawn = [mutant for mutant in found if mutant.name in numbers] if numbers else drawn
    coverages = Coverages(files, GROUPS[name][1])
    everything = {test: seconds for test, (seconds, _) in coverages.tests.items()}
    print(f"{name}: {len(everything)} tests, {sum(everything.values()):.0f} s", flush=True)
    counts: Counter[str] = Counter()
    for mutant in drawn:
        start = time.monotonic()
        seconds = coverages.tests_of(mutant)
        if (result := survives(mutant, seconds)) == "survived" and len(seconds) < len(everything):
            result = survives(mutant, everything)
        counts[result] += 1
        lines = Path("output.txt").read_text(errors="replace").splitlines()
        failed = " ".join(line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR")))
        print(f"{mutant.name}: {result}, {time.monotonic() - start:.0f} s {failed}", flush=True)
        if result == "survived":
            print(mutant.diff(), flush=True)
    print(f"{name}: {len(drawn)} of {len(found)} mutants, {dict(counts)}", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation tests; survivors and counts are printed.")
    parser.add_argument("parts", nargs="*", help="groups, folders, modules or mutants; default: all")
    parser.add_argument("--sample", type=int, default=30, help="mutants in the random sample of each group; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    for library in LIBRARIES.split():
        importlib.import_module(library)  # once, for all forked processes
    sys.dont_write_bytecode = True  # a mutant may have the size and the time of the original
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    paths = {part.split("#")[0] for part in args.parts}
    numbers = {part for part in args.parts if "#" in part}
    total: Counter[str] = Counter()
    seen: set[str] = set()
    for name, (patterns, _) in GROUPS.items():
        files = sorted({str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)} - seen)
        seen |= set(files)
        folders = paths - GROUPS.keys()
        inside = [file for file in files if any(f"{file}/".startswith(f"{part}/") for part in folders)]
        chosen = files if not paths or name in paths else inside
        if chosen:
            total += run_group(name, chosen, numbers, args)
    killed = total["killed"] + total["killed late"]
    print(f"killed {killed} of {total.total()} mutants: {killed / max(1, total.total()):.0%}")


if __name__ == "__main__":
    main()
