"""Checks of command-line arguments."""

import argparse
import math

from utils.errors import UserError

MAX_COUNT = 1_000_000
"""Largest number of clips, videos or frames that one command makes."""


def require_range(args: argparse.Namespace, lowest: float, highest: float, *names: str) -> None:
    """Check that arguments lie in a range; None and NaN included: None is skipped, NaN is an error.

    Args:
        names: attributes of `args`; a list is checked element by element.

    Raises:
        UserError: naming the flag and the range.
    """
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not lowest <= number <= highest:
                bounds = f"at least {lowest:g}" if highest == math.inf else f"{lowest:g} to {highest:,}"
                raise UserError(f"--{name} must be {bounds}, not {number}")
