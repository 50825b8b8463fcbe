"""One way to fail: a user's mistake becomes one clear line and a non-zero exit, never a traceback."""

import errno
import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's `main` so that expected failures print one line on stderr and exit non-zero.

    Exit codes: 2 for a `UserError`, 1 for a full or unwritable disk, 130 for Ctrl-C. Everything else is a bug of ours
    and keeps its traceback.
    """

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except UserError as error:
            sys.exit(_report(str(error), 2))
        except KeyboardInterrupt:
            sys.exit(_report("interrupted; finished files are kept, run the same command again to go on", 130))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            sys.exit(_report(f"cannot write {error.filename or 'output'}: {error.strerror}", 1))

    return run


def _report(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code
