"""Prompt tracks: the prompt of each block of a video. This module imports no torch.

A track is a list of entries (position, prompt). An entry holds from its block on, until the next entry. Its position is
a block number or a time such as "12.5s", which means the first block that starts then or later.
"""

import bisect
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

Position = int | str
"""Block number, or a time in seconds such as "12.5s"."""
TrackEntries = tuple[tuple[Position, str], ...]
MAX_ENTRIES = 10_000
"""Largest number of prompts of a track."""
_MAX_BYTES = 16_000_000
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*s")
_LINE = re.compile(r"""\s*["']?([^:"']*)["']?\s*:\s*(.*)""")


class PromptTrack:
    """The prompt of every block: entries (block, prompt), of which the first is for block 0."""

    def __init__(self, entries: Iterable[tuple[int, str]]):
        self._entries = list(entries)
        blocks = [block for block, _ in self._entries]
        assert blocks[:1] == [0] and blocks == sorted(set(blocks)), f"entries for blocks {blocks}"

    def prompt_at(self, block: int) -> str:
        """Return the prompt of a block."""
        return self._entry(block)[1]

    def is_switch(self, block: int) -> bool:
        """Return whether a block after block 0 has an entry of its own."""
        return self._entry(block)[0] == block > 0

    def prompts_at(self, block: int, first_prompts: Sequence[str]) -> list[str]:
        """Return the prompts of a block of several videos, which differ in the prompt of block 0."""
        start, prompt = self._entry(block)
        return list(first_prompts) if start == 0 else [prompt] * len(first_prompts)

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts, in the order of their first blocks."""
        return list(dict.fromkeys(prompt for _, prompt in self._entries))

    def to_metadata(self) -> list[list[Any]]:
        """Return the entries as JSON: [[block, prompt], ...]. `track_entries` reads them."""
        return [list(entry) for entry in self._entries]

    def _entry(self, block: int) -> tuple[int, str]:
        return self._entries[bisect.bisect_right(self._entries, block, key=lambda entry: entry[0]) - 1]


class LivePrompts(PromptTrack):
    """A track that grows while its video runs. A new prompt holds from the next block that has not started.

    The prompt of a block is fixed when it is first read, which is when the block's first op runs. The finished track
    gives the same latents. `prompt` may be set in any thread.
    """

    def __init__(self, prompt: str):
        """
        Raises:
            UserError: for an empty prompt.
        """
        self._prompt = checked_prompt(prompt)
        self._lock = threading.Lock()
        self._num_fixed = 0  # the prompts of earlier blocks no longer change
        super().__init__([(0, self._prompt)])

    @property
    def prompt(self) -> str:
        """The prompt of the blocks that have not started.

        Setting it raises `UserError` for an empty prompt, or after `MAX_ENTRIES` prompts.
        """
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        prompt = checked_prompt(prompt)
        with self._lock:
            if prompt != self._prompt and len(self._entries) >= MAX_ENTRIES:  # a saved track could not be read again
                raise UserError(f"this video has had {MAX_ENTRIES} prompts, which is the limit; start another video")
            self._prompt = prompt

    def prompts_at(self, block: int, first_prompts: Sequence[str]) -> list[str]:
        """Return the prompt of a block for each of several videos; `first_prompts` may have been replaced."""
        return [self.prompt_at(block)] * len(first_prompts)

    def to_metadata(self) -> list[list[Any]]:
        """Return the fixed entries; see `PromptTrack.to_metadata`."""
        with self._lock:
            return super().to_metadata()

    def _entry(self, block: int) -> tuple[int, str]:
        with self._lock:
            if block >= self._num_fixed:
                prompt = self._prompt
                if self._num_fixed == 0:
                    self._entries = [(0, prompt)]
                elif prompt != self._entries[-1][1]:
                    self._entries.append((block, prompt))
                self._num_fixed = block + 1
            return super()._entry(block)


def checked_prompt(text: str) -> str:
    """Return a prompt without surrounding spaces.

    Raises:
        UserError: if it is empty.
    """
    text = text.strip()
    if not text:
        raise UserError("the prompt is empty: describe a video")
    return text


# ---- Reading ----


def track_entries(
    source: str | os.PathLike[str] | Mapping[Any, str] | Sequence[Any], name: str = "prompt_track"
) -> TrackEntries:
    """Return the entries of a track, in the order of `source`.

    Args:
        source: path of a file, see `read_track`; a mapping from positions to prompts; or (position, prompt) pairs.
        name: name of `source`, for error messages.

    Raises:
        UserError: for a position that is no block and no time, an empty prompt, or two prompts at one position.
    """
    if isinstance(source, str | os.PathLike):
        return read_track(source)
    pairs = list(source.items() if isinstance(source, Mapping) else source)
    if not pairs or len(pairs) > MAX_ENTRIES:
        raise UserError(f"{name} must hold 1 to {MAX_ENTRIES} prompts, not {len(pairs)}")
    entries: dict[Position, str] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"{name} must hold pairs of a position and a prompt, not {pair!r}")
        position = _position(pair[0], name)
        if not isinstance(pair[1], str) or not pair[1].strip():
            raise UserError(f"{name}: the prompt at {position} is empty or no text")
        if position in entries:
            raise UserError(f"{name} has two prompts at {position}; remove one")
        entries[position] = pair[1].strip()
    return tuple(entries.items())


def read_track(path: str | os.PathLike[str]) -> TrackEntries:
    """Read a file of lines `block: prompt` or `12.5s: prompt`; a .yaml or .yml file holds the same as a mapping.

    Blank lines and lines that start with # are skipped.

    Raises:
        UserError: if the file cannot be read, or as in `track_entries`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(f"cannot read prompt track {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"prompt track {path} is larger than {_MAX_BYTES // 1_000_000} MB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt track {path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None
    pairs = _yaml_pairs(text, path) if path.suffix in (".yaml", ".yml") else _line_pairs(text, path)
    return track_entries(pairs, f"prompt track {path}")


def _line_pairs(text: str, path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"line {number} of prompt track {path} is not `block: prompt` or `12.5s: prompt`")
        prompt = match[2].strip()
        if len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "\"'":
            prompt = prompt[1:-1]
        pairs.append((match[1], prompt))
    return pairs


def _yaml_pairs(text: str, path: Path) -> list[tuple[str, str]]:
    """Return the pairs of a YAML mapping as text. Nodes are read instead of values, to find repeated positions."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"prompt track {path} is not valid YAML: {' '.join(str(error).split())}") from None
    pairs = node.value if isinstance(node, yaml.MappingNode) else None
    if pairs is None or not all(isinstance(part, yaml.ScalarNode) for pair in pairs for part in pair):
        raise UserError(f"prompt track {path} must map blocks or times to prompts, such as `7: a blue circle`")
    return [(key.value, value.value) for key, value in pairs]


def _position(value: Any, name: str) -> Position:
    """Return a block number, or a time as "12.5s"."""
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    if (match := _TIME.fullmatch(text)) and len(text) < 20:
        return f"{match[1]}s"
    raise UserError(f"{name}: {value!r} is no block (0, 1, ...) and no time (12.5s)")


# ---- Blocks of times ----


def resolve_track(
    entries: TrackEntries, prompt: str, num_blocks: int, start_seconds: Callable[[int], float]
) -> PromptTrack:
    """Return the track of a video.

    Args:
        entries: from `track_entries`.
        prompt: prompt of block 0, if no entry has that position.
        num_blocks: of the video.
        start_seconds: maps a block to the time of its first pixel frame.

    Raises:
        UserError: for a position after the last block, or for two positions of one block.
    """
    prompts: dict[int, tuple[Position, str]] = {}
    for position, text in entries:
        block = position if isinstance(position, int) else _block_of_time(position, num_blocks, start_seconds)
        if block >= num_blocks:
            raise UserError(f"prompt_track: {position} is after the start of the video's last block, {num_blocks - 1}")
        if block in prompts:
            raise UserError(f"prompt_track: {prompts[block][0]} and {position} are the same block {block}; remove one")
        prompts[block] = position, text
    prompts.setdefault(0, (0, prompt))
    return PromptTrack((block, prompts[block][1]) for block in sorted(prompts))


def first_prompt(entries: TrackEntries) -> str:
    """Return the prompt at block 0 or 0 seconds; empty if there is none."""
    return next((text for position, text in entries if _seconds(position) == 0), "")


def _seconds(position: Position) -> float:
    return float(position.removesuffix("s")) if isinstance(position, str) else float(position)


def _block_of_time(position: str, num_blocks: int, start_seconds: Callable[[int], float]) -> int:
    rounding = 1e-9
    return bisect.bisect_left(range(num_blocks), _seconds(position) - rounding, key=start_seconds)
