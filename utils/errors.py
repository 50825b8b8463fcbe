"""Errors of the commands: a user's mistake ends a command with one line and a non-zero exit code, not a traceback."""

import contextlib
import errno
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
"""Error numbers of a full or unwritable disk."""


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong, and what to do."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main` so that expected failures print one line on stderr and exit with a non-zero code.

    Exit codes: 2 for a `UserError`, 1 for a full or unwritable disk, 130 for Ctrl-C. Any other exception is a bug and
    keeps its traceback. torchrun repeats the error at the end of its own report.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except UserError as error:
            sys.exit(_report(str(error), 2))
        except KeyboardInterrupt:
            message = "interrupted; finished files are kept, run the same command again to resume"
            sys.exit(_report(message, 130, delay=1))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                sys.exit(_report(f"cannot write {error.filename or 'output'}: {error.strerror}", 1))
            report_to_torchrun(traceback.format_exc(), delay=1)
            raise

    return run


def _report(message: str, code: int, delay: int = 0) -> int:
    line = "error: " + " ".join(message.split())
    report_to_torchrun(line, delay)
    print(line, file=sys.stderr, flush=True)
    return code


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
