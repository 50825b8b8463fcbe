"""torch.compile with a fallback to uncompiled functions."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException


class FallbackCompiler:
    """Compiles functions. After the first failure, it prints one note, and all its functions run uncompiled."""

    def __init__(self) -> None:
        self._failed = False

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(function)

        def run(*arguments: Any) -> Any:
            if not self._failed:
                try:
                    return compiled(*arguments)
                except TorchDynamoException as error:  # raised while compiling, before anything has run
                    self._failed = True
                    print(f"note: layers run uncompiled: {compile_failure(error)}", file=sys.stderr, flush=True)
            return function(*arguments)

        return run


def compile_failure(error: TorchDynamoException) -> str:
    """Return one line with the cause of a failed torch.compile."""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
