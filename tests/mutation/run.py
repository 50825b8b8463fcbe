"""Run mutmut on model/, pipeline/ and trainer/, and print the mutants that no test notices: `make mutation`.

    python tests/mutation/run.py                              # all mutants of the modules in TESTS
    python tests/mutation/run.py model/flow.py --sample 40    # a random sample of 40 mutants of one module
    python tests/mutation/run.py model pipeline trainer --sample 40    # of each whole package, with all its fast tests

A copy of the repository under mutation/ is mutated. mutmut selects the tests that call the mutated function. It skips
decorated functions; error messages and assertions are not mutated either.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mutation"
PACKAGES = ("model", "pipeline", "trainer")
TESTS = {
    "model/flow.py": ["model/test_flow.py"],
    "model/kv_cache.py": ["model/test_kv_cache.py"],
    "pipeline/rollout.py": ["pipeline/test_rollout.py"],
    "pipeline/schedule.py": ["pipeline/test_schedule.py", "pipeline/test_rollout.py", "pipeline/test_training_rollout.py"],
    "trainer/datasets/order.py": ["trainer/test_order.py"],
    "trainer/objectives/losses.py": ["trainer/test_losses.py"],
    "trainer/optim.py": ["trainer/test_optim.py", "trainer/test_trainer.py"],
}
SURVIVED = {0: "survived", 5: "no test", 33: "no test"}  # exit codes in mutmut's results; all others are kills
SETTINGS = """[mutmut]
source_paths = {package}
only_mutate = {module}
also_copy =
    {others}
pytest_add_cli_args_test_selection =
    {tests}
pytest_add_cli_args =
    -p
    no:cacheprovider
    -m
    not slow
    --deselect
    tests/pipeline/test_schedule.py::test_the_module_imports_no_torch
do_not_mutate_patterns =
    raise \\w*Error\\(
    ^\\s*assert
process_isolation = forkserver
track_dependencies = false
"""


def prepare(name: str, package: str, module: str, tests: list[str]) -> Path:
    """Copy the repository's files to mutation/`name`, with mutmut's settings; return that folder."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for file in filter(None, files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    others = sorted({file.split("/")[0] for file in files if file} - {package})
    lines = {"others": "\n    ".join(others), "tests": "\n    ".join(f"tests/{test}" for test in tests)}
    (folder / "setup.cfg").write_text(SETTINGS.format(package=package, module=module, **lines))
    return folder


def mutmut(folder: Path, *names: str, fails: bool = False) -> None:
    """Run mutmut in one worker process for these mutants; for all without names."""
    words = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", "run", "--max-children", "1", *names]
    done = subprocess.run(words, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode and not fails:
        sys.exit(f"mutmut failed in {folder}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def results(folder: Path) -> dict[str, int | None]:
    """Return the exit code of every mutant; None if it has not run."""
    found: dict[str, int | None] = {}
    for file in sorted((folder / "mutants").rglob("*.meta")):
        found |= json.loads(file.read_text())["exit_code_by_key"]
    return found


def run_group(folder: Path, sample: int, seed: int) -> Counter[str]:
    """Test the mutants of a prepared folder, or a sample of them; print the survivors and return the counts."""
    names: list[str] = []
    if sample:
        mutmut(folder, "none", fails=True)  # makes the mutants, maps the tests, and finds no mutant of that name
        made = sorted(results(folder))
        names = random.Random(seed).sample(made, min(sample, len(made)))
    mutmut(folder, *names)
    codes = {name: code for name, code in results(folder).items() if not names or name in names}
    for name in [name for name, code in codes.items() if code in SURVIVED]:
        words = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", "show", name]
        print(subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout, flush=True)
    counts = Counter(SURVIVED.get(code if code is not None else 0, "killed") for code in codes.values())
    print(f"{folder.name}: {len(codes)} mutants, {dict(counts)}", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation tests; survivors and counts are printed.")
    parser.add_argument("parts", nargs="*", help="modules of TESTS, or whole packages; default: all modules of TESTS")
    parser.add_argument("--sample", type=int, default=0, help="mutants in a random sample of each part; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    args = parser.parse_args()
    total: Counter[str] = Counter()
    for part in args.parts or TESTS:
        module, tests = (part, TESTS[part]) if part in TESTS else (f"{part}/*", [part])
        folder = prepare(part.replace("/", "."), part.split("/")[0], module, tests)
        total += run_group(folder, args.sample, args.seed)
    print(f"killed {total['killed']} of {total.total()} mutants: {total['killed'] / total.total():.0%}")


if __name__ == "__main__":
    main()
