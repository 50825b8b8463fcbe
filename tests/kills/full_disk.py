"""Fill the disk at every kind of write, and check the error and the files: `make full-disk`. It needs root on Linux.

    python tests/kills/full_disk.py [--levels 8] [--only inference]

Each command writes to a small file system in memory (tmpfs) that has room for only a part of the output, from nothing
to almost everything. The command must end with one error line, leave no partial file, and keep every existing file.
Started again with enough room, it must finish with the bytes of an undisturbed run.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from processes import ROOT, Command, contents, make_commands, run

SIZE = 64 << 20  # of the file system
PAGE = 4096


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs of SIZE bytes on `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        sys.exit("error: cannot mount a tmpfs; run this script as root, or with `unshare -rm`")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(folder: Path, free: int) -> Path:
    """Write a file that leaves `free` bytes of the disk; return it."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, free_bytes(folder) - free)))
    return ballast


def complete_files(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return the names of files that are neither complete nor a log with whole lines.

    Checkpoints that an undisturbed run deletes again are complete, because `contents` could read them.
    """
    wrong = []
    for name, content in found.items():
        whole = expected.get(name)
        if whole is None and name.startswith("checkpoints/"):
            continue
        is_log = name.endswith(".jsonl") and whole is not None and whole.startswith(content)
        if content != whole and not (is_log and (not content or content.endswith(b"\n"))):
            wrong.append(name)
    return wrong


def check(command: Command, folder: Path, free: int, existing: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """Run a command with `free` bytes of room, then with enough; return its error, or raise AssertionError.

    Args:
        existing: files of the output folder that exist before.
    """
    with small_disk(folder) as disk:
        target, log = disk / "out", folder.with_suffix(".log")
        for file, content in existing.items():
            target.mkdir(exist_ok=True)
            (target / file).write_bytes(content)
        ballast = fill(disk, free)
        [code], printed = run(command, target, log)
        found = contents(target) if target.exists() else {}
        result = "finished"
        if code:
            errors = [line for line in printed.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and "Traceback" not in printed, f"{len(errors)} error lines:\n{printed[-2500:]}"
            result = errors[0].replace(str(disk), "")
        partial = [str(file) for file in disk.rglob("*") if "partial" in file.name or "unfinished" in file.name]
        assert not partial, f"{partial} remain after: {result}"
        lost = [file for file, content in existing.items() if (target / file).read_bytes() != content]
        assert not lost, f"{lost} existed and changed after: {result}"
        assert not (wrong := complete_files(found, expected)), f"{wrong} are incomplete after: {result}"
        ballast.unlink()
        [code], printed = run(command, target, log)
        assert code == 0, f"the same command fails with enough room:\n{printed[-2500:]}"
        assert contents(target) == expected, "the same command gives other bytes"
    return result


def make_writers(folder: Path) -> list[tuple[Command, list[str]]]:
    """Return the commands, each with patterns of its files that exist before. All ranks write like inference.py."""
    inference, _, training = make_commands(folder)
    prompts, model = str(folder / "prompts.txt"), str(folder / "model")
    config = ["--config_path", str(folder / "videos.yaml")]
    pairs = [*config, "--caption_path", prompts, "--num_inference_steps", "2", "--save_indices", "0", "1", "2"]
    clips = ["--base", model, "--num_clips", "70", "--num_frames", "3", "--device", "cpu", "--output"]
    lmdb = ["--data_path", str(folder / "clips"), "--lmdb_path"]
    embeddings = [*config, "--data_path", prompts]

    def command(name: str, module: str, *words: str) -> Command:
        return Command(name, module, 1, lambda target: [*words, str(target)])

    return [
        (inference, ["a red circle-0.*"]),
        (training, []),
        (command("ODE pairs", "scripts.generate_ode_pairs", *pairs, "--output_folder"), ["00000.pt", "*.json"]),
        (command("clips", "scripts.encode_clips", *clips), ["000000.safetensors"]),
        (command("LMDB", "scripts.create_lmdb", *lmdb), []),
        (
            Command("embeddings", "scripts.encode_prompts", 1, lambda to: [*embeddings, f"model.text_cache={to}"]),
            [],
        ),
    ]


def sweep(command: Command, patterns: list[str], folder: Path, levels: int) -> int:
    """Run a command at several amounts of free space; print the outcomes and return the number of failures."""
    whole = folder / f"{command.name} expected"
    [code], printed = run(command, whole)
    assert code == 0, printed
    existing = {file.name: file.read_bytes() for pattern in patterns for file in whole.glob(pattern)}
    assert bool(existing) == bool(patterns)
    expected, failures = contents(whole), 0
    used = sum(-(-file.stat().st_size // PAGE) * PAGE for file in whole.rglob("*") if file.is_file())
    for level in range(levels):
        free = int(1.2 * used * level / levels) // PAGE * PAGE
        try:
            result = check(command, folder / "disk", free, existing, expected)
        except AssertionError as error:
            failures, result = failures + 1, f"FAILED: {error}"
        print(f"{command.name}, {free >> 10} KiB free: {result}", flush=True)
        (folder / "disk").rmdir()
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=8, help="amounts of free space per command")
    parser.add_argument("--only", help="one command: inference, training, ODE pairs, clips, LMDB or embeddings")
    args = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        writers = [(command, files) for command, files in make_writers(Path(name)) if args.only in (None, command.name)]
        failures = sum(sweep(command, files, Path(name), args.levels) for command, files in writers)
    sys.exit(f"{failures} failures" if failures else 0)


if __name__ == "__main__":
    main()
