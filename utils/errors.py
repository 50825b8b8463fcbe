"""Errors of the commands: a user's mistake ends a command with one line and a non-zero exit code, not a traceback."""

import contextlib
import errno
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, overload

from utils.memory import memory_shortage

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.ELOOP),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
)
"""Error numbers of a disk that is full or not writable, and of paths that cannot be a file or a folder."""
INTERRUPTED = "interrupted; finished files are kept, run the same command again to resume"
LOWERS_MEMORY = "smaller sizes or batches, or use a machine with more memory"


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong, and what to do."""


@overload
def command(main: Callable[[], None]) -> Callable[[], None]: ...
@overload
def command(*, lowers_memory: str) -> Callable[[Callable[[], None]], Callable[[], None]]: ...
def command(main: Callable[[], None] | None = None, *, lowers_memory: str = LOWERS_MEMORY) -> Callable[..., Any]:
    """Wrap a script's `main` so that expected failures print one line on stderr and exit with a non-zero code.

    SIGTERM ends the command as Ctrl-C does. Any failure that `expected_failure` does not name is a bug and keeps its
    traceback. torchrun repeats the error at the end of its own report.

    Args:
        lowers_memory: the options that lower the command's memory, for the error message.
    """
    if main is None:
        return functools.partial(_wrap, lowers_memory)
    return _wrap(lowers_memory, main)


def _wrap(lowers_memory: str, main: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(main)
    def run() -> None:
        with _OneLineErrors(lowers_memory), _terminate_as_interrupt():
            main()

    return run


def expected_failure(error: BaseException, lowers_memory: str = LOWERS_MEMORY) -> tuple[str, int] | None:
    """Return the line and the exit code of a failure that is no bug; None for a bug.

    Exit codes: 2 for a `UserError`, 1 for the disk and for memory, 130 for Ctrl-C and SIGTERM.
    """
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, 130
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"cannot write {error.filename2 or error.filename or 'output'}: {error.strerror}", 1
    shortage = memory_shortage(error)
    return None if shortage is None else (f"{shortage}; lower it with {lowers_memory}", 1)


class _OneLineErrors:
    """Turns an expected failure of the `with` block into one line and an exit; reports any other to torchrun."""

    def __init__(self, lowers_memory: str):
        self.lowers_memory = lowers_memory

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (SystemExit, GeneratorExit)):
            return
        failure = expected_failure(error, self.lowers_memory)
        if failure is None:
            report_to_torchrun("".join(traceback.format_exception(error)), delay=1)
            return
        message, code = failure
        line = "error: " + " ".join(message.split())
        report_to_torchrun(line, delay=0 if code == 2 else 1)
        print(line, file=sys.stderr, flush=True)
        raise SystemExit(code) from None


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM inside the `with` block, so that partial files are deleted.

    A handler that the program has already installed stays in place.
    """
    is_main = threading.current_thread() is threading.main_thread()  # Python allows handlers in this thread only
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def report_to_torchrun(text: str, delay: int = 0) -> None:
    """Write an error to the file that torchrun reads. torchrun prints the earliest error at the end of its report.

    Args:
        delay: seconds to add to the time of the error. If a rank fails, the other ranks lose their connection or are
            stopped. With a delay, these secondary errors come later than their cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"py_callstack": "\n" + text.rstrip(), "timestamp": str(int(time.time()) + delay)}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": details}}, file)
