"""Runs a function in a new process, so that its peak memory can be measured alone. Imports no slow modules."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from utils.errors import UserError


def run_in_process(work: Callable[..., Any], *arguments: object) -> Any:
    """Return the result of `work(*arguments)` in a new process.

    Raises:
        UserError: if `work` raises it, or if the process ends without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"the process ended with code {process.exitcode}; -9 usually means that memory ran out: use a smaller "
            "train.batch_size or video"
        ) from None
    process.join()
    if isinstance(result, UserError):
        raise result
    return result


def _send_result(connection: Connection, work: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this daemon process
    try:
        connection.send(work(*arguments))
    except UserError as error:
        connection.send(error)
