"""Run mutmut on model/, pipeline/ and trainer/, and print the mutants that no test notices: `make mutation`.

    python tests/mutation/run.py                            # all mutants of all modules; takes a day
    python tests/mutation/run.py --sample 12                # a random sample of 12 mutants of each module
    python tests/mutation/run.py model/flow.py trainer/optim.py pipeline/parallel --sample 40    # of these

A copy of the repository under mutation/ is mutated. mutmut selects the fast tests that call the mutated function. It
skips decorated functions; error messages and assertions are not mutated either.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mutation"
GROUPS: dict[str, tuple[list[str], list[str]]] = {  # modules, and the tests that run for their mutants
    "model": (
        ["model/*.py"],
        ["model", "bad_input/test_damaged_weights.py", "bad_input/test_model_folders.py"]
        + [f"pipeline/test_{name}.py" for name in ("bidirectional", "rollout", "teacher", "text_to_video")]
        + ["scripts/test_convert_checkpoint.py", "scripts/test_random_transformer.py"],
    ),
    "rollouts": (
        ["pipeline/rollout.py", "pipeline/schedule.py", "pipeline/training_rollout.py"],
        ["pipeline/test_rollout.py", "pipeline/test_schedule.py", "pipeline/test_training_rollout.py"],
    ),
    "pipeline": (["pipeline/*.py"], ["pipeline/test_*.py", "bad_input/test_records.py"]),
    "parallel": (["pipeline/parallel/*.py"], ["pipeline/parallel"]),
    "trainer": (
        ["trainer/*.py"],
        [f"trainer/test_{name}.py" for name in ("checkpoint_reader", "logging", "optim", "planner", "resume")]
        + ["trainer/test_train_command.py", "trainer/test_trainer.py", "utils/test_files.py"],
    ),
    "datasets": (
        ["trainer/datasets/*.py"],
        [
            "trainer/test_datasets.py",
            "trainer/test_order.py",
            "trainer/test_objectives.py",
            "bad_input/test_ode_pairs.py",
        ],
    ),
    "objectives": (
        ["trainer/objectives/*.py"],
        ["trainer/test_losses.py", "trainer/test_objectives.py", "trainer/test_score_distillation.py"],
    ),
}
MUTMUT = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()"]
MEMORY = 8 << 30  # bytes
SURVIVED = {0: "survived", 5: "no test", 33: "no test"}  # exit codes in mutmut's results; all others are kills
SETTINGS = """[mutmut]
source_paths = {package}
only_mutate =
    {modules}
also_copy =
    {others}
pytest_add_cli_args_test_selection =
    {tests}
pytest_add_cli_args =
    -p
    no:cacheprovider
    -m
    not slow
    --timeout=120
    --deselect
    tests/pipeline/test_schedule.py::test_the_module_imports_no_torch
do_not_mutate_patterns =
    raise \\w*Error\\(
    ^\\s*assert
timeout_constant = 30
timeout_multiplier = 3
process_isolation = forkserver
track_dependencies = false
"""


def expand(tests: list[str]) -> list[str]:
    """Return the paths of all tests that match the patterns."""
    return sorted(str(path.relative_to(ROOT)) for test in tests for path in (ROOT / "tests").glob(test))


def prepare(name: str, modules: list[str], tests: list[str]) -> Path:
    """Copy the repository's files to mutation/`name`, with mutmut's settings; return that folder."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for file in filter(None, files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    package = modules[0].split("/")[0]
    others = sorted({file.split("/")[0] for file in files if file} - {package})
    lines = {"others": others, "modules": modules, "tests": expand(tests)}
    text = SETTINGS.format(package=package, **{key: "\n    ".join(value) for key, value in lines.items()})
    (folder / "setup.cfg").write_text(text)
    return folder


def limit_memory() -> None:
    """Let a mutant that allocates without end fail."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def mutmut(folder: Path, *names: str, fails: bool = False) -> None:
    """Run mutmut in one worker process for these mutants; for all without names."""
    words = [*MUTMUT, "run", "--max-children", "1", *names]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=one, capture_output=True, text=True, preexec_fn=limit_memory)
    if done.returncode and not fails:
        sys.exit(f"mutmut failed in {folder}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def results(folder: Path) -> dict[str, dict[str, int | None]]:
    """Return the exit code of every mutant of every module; None if it has not run."""
    files = sorted((folder / "mutants").rglob("*.meta"))
    return {
        str(file.relative_to(folder / "mutants").with_suffix("")): json.loads(file.read_text())["exit_code_by_key"]
        for file in files
    }


def run_group(folder: Path, sample: int, seed: int) -> Counter[str]:
    """Test the mutants of a prepared folder, or a sample of each module; print the survivors and return the counts."""
    names: list[str] = []
    if sample:
        mutmut(folder, "none", fails=True)  # makes the mutants, maps the tests, and finds no mutant of that name
        for made in results(folder).values():
            names += random.Random(seed).sample(sorted(made), min(sample, len(made)))
    mutmut(folder, *names)
    total: Counter[str] = Counter()
    for module, codes in results(folder).items():
        chosen = {name: code for name, code in codes.items() if not names or name in names}
        for name in [name for name, code in chosen.items() if code in SURVIVED]:
            shown = subprocess.run([*MUTMUT, "show", name], cwd=folder, capture_output=True, text=True)
            print(shown.stdout, flush=True)
        counts = Counter(SURVIVED.get(code if code is not None else 0, "killed") for code in chosen.values())
        print(f"{module}: {len(chosen)} of {len(codes)} mutants, {dict(counts)}", flush=True)
        total += counts
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation tests; survivors and counts are printed.")
    parser.add_argument("parts", nargs="*", help="modules or folders; default: all")
    parser.add_argument("--sample", type=int, default=0, help="mutants in a random sample of each module; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    args = parser.parse_args()
    total: Counter[str] = Counter()
    seen: set[str] = set()
    for name, (patterns, tests) in GROUPS.items():
        files = sorted({str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)} - seen)
        seen |= set(files)
        modules = [file for file in files if not args.parts or any(f"{file}/".startswith(f"{p}/") for p in args.parts)]
        if modules:
            total += run_group(prepare(name, modules, tests), args.sample, args.seed)
    print(f"killed {total['killed']} of {total.total()} mutants: {total['killed'] / max(1, total.total()):.0%}")


if __name__ == "__main__":
    main()
