"""torch.compile for the layers of the causal DiT, with a fallback to uncompiled functions."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from model.attention import CachedAttention, SelfAttention
from model.full_window import full_window
from model.wan_layer import CausalWanLayer


def compiles(setting: str, device: torch.device) -> bool:
    """Return whether `model.compile`, which is auto, on or off, means compilation on a device."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def keep_compiled_code(announce: bool = True) -> Path:
    """Let Inductor keep compiled code in one folder, so that later runs compile faster; return the folder.

    The environment variables TORCHINDUCTOR_CACHE_DIR and XDG_CACHE_HOME, in this order, change the folder.

    Args:
        announce: print a line that names the folder.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "hiar" / "inductor")))
    if announce:
        print(f"compiling the layers during their first passes; {folder} keeps the code", file=sys.stderr, flush=True)
    return folder


def compile_layers(layers: Sequence[CausalWanLayer], fall_back: bool = True) -> None:
    """Compile layers in two ways, and let each pass use the one that fits.

    In a pass over one block with a full window, a layer is one graph, self-attention included. Otherwise the context's
    length changes from block to block, or a pass over two blocks writes to the cache in between. Then the parts before
    and after the self-attention are compiled. All layers share the compiled code.

    Args:
        fall_back: true: if compilation fails, print a note once and run uncompiled. false: raise the error.

    Raises:
        TorchDynamoException: at the first pass, if compilation fails and `fall_back` is false.
    """
    compiler = Compiler(fall_back)
    whole = compiler(CausalWanLayer.forward, fullgraph=True, dynamic=False)
    for layer in layers:
        layer.qkv = compiler(layer.qkv)  # type: ignore[method-assign]
        layer.after_attention = compiler(layer.after_attention)  # type: ignore[method-assign]
        layer.forward = partial(_forward, layer, whole)  # type: ignore[method-assign]


def _forward(
    layer: CausalWanLayer,
    whole: Callable[..., Tensor],
    index: int,
    hidden: Tensor,
    modulation: Any,
    rope: Any,
    text_k: Tensor,
    text_v: Tensor,
    self_attention: SelfAttention,
) -> Tensor:
    """Run a compiled layer; `CausalWanLayer.forward` describes the arguments."""
    arguments = hidden, modulation, rope, text_k, text_v
    window = full_window(self_attention, index)
    if window is None:
        return CausalWanLayer.forward(layer, index, *arguments, self_attention)
    output = whole(layer, 0, *arguments, window)  # without the index, all layers are one graph
    if isinstance(self_attention, CachedAttention) and self_attention.append:
        self_attention.cache.append(index, *window.block(hidden.shape[1]))
    return output


class Compiler:
    """Compiles functions. After the first failure, it prints one note, and all its functions run uncompiled."""

    def __init__(self, fall_back: bool):
        """
        Args:
            fall_back: false: raise the failure instead.
        """
        self._fall_back, self._failed = fall_back, False

    def __call__(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Return a function that is compiled at its first call; `options` are those of torch.compile."""
        compiled = torch.compile(function, **options)

        def run(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or self._failed:
                return function(*arguments)
            try:
                return compiled(*arguments)
            except TorchDynamoException as error:  # raised while compiling, before anything has run
                if not self._fall_back:
                    raise
                self._failed = True
                print(f"note: layers run uncompiled: {compile_failure(error)}", file=sys.stderr, flush=True)
            return function(*arguments)

        return run


def compile_failure(error: TorchDynamoException) -> str:
    """Return one line with the cause of a failed torch.compile."""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
