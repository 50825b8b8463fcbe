"""utils/files.py and utils/errors.py: files are complete or absent, and an expected failure prints one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from utils.errors import UserError, command
from utils.files import atomic_path, fingerprint, writable_folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run(error: BaseException | None) -> int:
    """Return the exit code of a command that raises `error`; 0 if it returns."""

    @command
    def main() -> None:
        if error is not None:
            raise error

    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


# ---- atomic_path ----


def test_the_final_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "a.json"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent and temporary.suffix == ".json" and temporary.name.startswith(".")
    assert names(tmp_path) == ["a.json"] and path.read_text() == "half"


def test_the_final_file_is_the_temporary_one_renamed(tmp_path):
    """A copy would exist half-written for a moment, and would change the content under readers of the older file."""
    path = tmp_path / "a.json"
    path.write_text("older")
    with path.open() as reader:
        with atomic_path(path) as temporary:
            temporary.write_text("new content")
            written = temporary.stat().st_ino
        assert path.stat().st_ino == written and reader.read() == "older"
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        written = temporary.stat().st_ino
    assert (tmp_path / "folder").stat().st_ino == written


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_keeps_the_older_file_and_leaves_no_temporary_file(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("older")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a.json"] and path.read_text() == "older"


def raise_torch_error() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 768 vs 662")  # noqa: B904 -- as torch


def raise_safetensors_error() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def raise_disk_error() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fail", [raise_disk_error, raise_torch_error, raise_safetensors_error])
def test_a_full_disk_is_reported_with_the_final_name(tmp_path, fail):
    path = tmp_path / "a.pt"
    path.write_text("older")
    with (
        pytest.raises(OSError, match="No space left") as caught,
        atomic_path(path) as outer,
        atomic_path(outer) as inner,
    ):
        inner.write_text("half")
        fail()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert names(tmp_path) == ["a.pt"] and path.read_text() == "older"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), PermissionError(errno.EACCES, "Permission denied", "other")])
def test_other_errors_keep_their_type_and_file(tmp_path, error):
    with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "a"):
        raise error
    assert caught.value is error


def test_a_body_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.json"):
        pass
    assert names(tmp_path) == []


def test_atomic_writes_can_be_nested(tmp_path):
    with atomic_path(tmp_path / "a.mp4") as outer:
        outer.write_text("first")
        with atomic_path(outer) as inner:
            inner.write_text("second")
            assert inner != outer
    assert names(tmp_path) == ["a.mp4"] and (tmp_path / "a.mp4").read_text() == "second"


def test_files_get_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    with atomic_path(tmp_path / "file") as path:
        save_file({"x": torch.zeros(1)}, path)  # creates a private file
        assert path.stat().st_mode != usual
    with atomic_path(tmp_path / "folder") as path:
        (path / "inner").mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, path / "inner" / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "folder/inner/file").stat().st_mode == usual


# ---- writable_folder ----


def test_writable_folder_creates_folders_and_leaves_them_empty(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b")
    assert writable_folder(str(folder)) == folder and names(folder) == []


def test_a_file_in_place_of_a_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match="choose another output folder"):
            writable_folder(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_user_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        writable_folder(tmp_path)


# ---- command ----


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("frames: 20\nuse 18 or 21"), 2, "error: frames: 20 use 18 or 21"),
        (KeyboardInterrupt(), 130, "error: interrupted; finished files are kept, run the same command again to resume"),
        (OSError(errno.ENOSPC, "Disk full", "a.mp4"), 1, "error: cannot write a.mp4: Disk full"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "error: cannot write output: Permission denied"),
        (SystemExit(7), 7, ""),
    ],
)
def test_an_expected_failure_prints_one_line_and_sets_the_exit_code(capsys, error, code, line):
    assert run(error) == code
    assert capsys.readouterr() == ("", line and line + "\n")


@pytest.mark.parametrize("bug", [KeyError("x"), ValueError("x"), OSError(errno.EIO, "broken")])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)):
        run(bug)


def test_command_keeps_the_name_and_prints_no_traceback():
    @command
    def main() -> None:
        """Docs."""

    assert main.__name__ == "main" and main.__doc__ == "Docs."
    code = "from utils.errors import *\n@command\ndef main():\n    raise UserError('a is wrong: do b')\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: a is wrong: do b\n")


def test_a_fingerprint_depends_on_names_and_both_ends_of_files(tmp_path):
    content = bytearray(300_000)
    big = tmp_path / "vae/big.bin"
    big.parent.mkdir()
    big.write_bytes(content)
    before = fingerprint(tmp_path, ["vae/*"])
    for position in (0, 65_535, -65_536, -1):
        changed = content.copy()
        changed[position] = 1
        big.write_bytes(changed)
        assert fingerprint(tmp_path, ["vae/*"]) != before
    big.write_bytes(content)
    assert fingerprint(tmp_path, ["vae/*"]) == before
    big.rename(big.with_name("other.bin"))
    assert fingerprint(tmp_path, ["vae/*"]) != before
