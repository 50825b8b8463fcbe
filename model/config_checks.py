"""Checks of a network's config.json: types and sizes, before anything is built from it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from utils.errors import UserError
from utils.memory import memory_shortage

_MAX_SIZE = 10_000_000
_LIMITS = {
    **dict.fromkeys(("num_layers", "num_decoder_layers", "num_res_blocks"), 1000),
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "num_heads", "d_kv"), 4096),
    **dict.fromkeys(("dim", "ffn_dim", "freq_dim", "text_dim", "d_model", "d_ff", "base_dim"), 100_000),
    **dict.fromkeys(("decoder_base_dim", "in_channels", "out_channels", "z_dim", "in_dim", "out_dim"), 100_000),
}
"""Largest sizes; the largest Wan has 40 layers of 5120 channels."""
_BUILD_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError, NameError),
    StrictDataclassError,
)
"""Exceptions of constructors that are called with impossible sizes."""
_OPTIONAL = ("out_channels", "classifier_dropout", "pad_token_id", "eos_token_id", "decoder_start_token_id")
_COPY = "copy or download the model folder again"


def check_sizes(config: Mapping[str, Any], defaults: Mapping[str, Any], file: Path) -> None:
    """Check the values of a config.json against the defaults of the class that it configures.

    Args:
        defaults: values of the same keys with the right types; keys without a default, or with None, are not compared.

    Raises:
        UserError: for the first value of another type, a negative size, or a size above the limit. It names the key.
    """
    for name, value in config.items():
        default = defaults.get(name)
        if default is not None and value is not None and not _same_type(value, default):
            raise UserError(f"{file}: {name} must be {_describe(default)}, not {str(value)[:40]!r}; {_COPY}")
        if default is not None and value is None and name not in _OPTIONAL:
            raise UserError(f"{file}: {name} has no value; {_COPY}")
        limit = _LIMITS.get(name, _MAX_SIZE)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int) and not -1 <= number <= limit:
                raise UserError(f"{file}: {name} must be at most {limit:,} and not negative, not {number}; {_COPY}")


def check_text_positions(config: Mapping[str, Any], file: Path) -> None:
    """Check the relative positions in the configuration of a UMT5 encoder, after `check_sizes`.

    Raises:
        UserError: if the buckets cannot reach the largest distance.
    """
    buckets = config.get("relative_attention_num_buckets", 32)
    distance = config.get("relative_attention_max_distance", 128)
    if buckets < 4 or distance <= buckets // 4:
        raise UserError(f"{file}: {buckets} attention buckets cannot span a distance of {distance}; {_COPY}")


def check_vae_sizes(config: Mapping[str, Any], file: Path) -> None:
    """Check the sizes in the configuration of a VAE, after `check_sizes`.

    Raises:
        UserError: if the channels are not those of the patches of an RGB image.
    """
    patch = 1 if config.get("patch_size") is None else config["patch_size"]
    if isinstance(patch, bool) or not isinstance(patch, int) or not 1 <= patch <= 64:
        raise UserError(f"{file}: patch_size must be a whole number from 1 to 64, not {str(patch)[:40]!r}; {_COPY}")
    for name in ("in_channels", "out_channels"):
        if config.get(name, 3) != 3 * patch**2:
            raise UserError(f"{file}: {name} must be {3 * patch**2} for patches of {patch}x{patch} pixels; {_COPY}")


def class_defaults(network: Callable[..., Any]) -> dict[str, Any]:
    """Return the default of every argument of a class that has one."""
    parameters = inspect.signature(network).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@contextmanager
def describes_network(file: Path | str, kind: str) -> Iterator[None]:
    """Turn an error of a constructor in the `with` block into one line that names the file with its arguments.

    Raises:
        UserError: for an error in the block.
    """
    try:
        yield
    except UserError:
        raise
    except _BUILD_ERRORS as error:
        if memory_shortage(error) is not None:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise UserError(f"{file} does not describe a {kind} ({reason}); choose another folder or file") from None


def _same_type(value: Any, default: Any) -> bool:
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple) and (not default or all(_same_type(v, default[0]) for v in value))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))


def _describe(default: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object"}
    if isinstance(default, list | tuple):
        return f"a list, each {_describe(default[0])}" if default else "a list"
    return names.get(type(default), f"a {type(default).__name__}")
