"""Arguments that the methods of `TextToVideo` share: prompts, prompt tracks, images and clips."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.prefix import check_prefix_exists
from pipeline.prompt_track import LivePrompts, checked_prompt, first_prompt, track_entries
from utils.errors import UserError
from utils.prompts import Prompt

TrackSource = str | os.PathLike[str] | Mapping[Any, str] | Sequence[Any] | LivePrompts
"""Path of a track's file, mapping from positions to prompts, pairs, or prompts that change during the rollout."""


def as_prompt(text: str, track: TrackSource | None = None) -> Prompt:
    """Return a prompt with the track of a call.

    Raises:
        UserError: for an empty prompt, or an entry for block 0 that differs from `text`.
    """
    if isinstance(track, LivePrompts):
        return Prompt(0, track.prompt, track.prompt)
    entries = () if track is None else track_entries(track)
    text = checked_prompt(text or first_prompt(entries))
    if first_prompt(entries) not in ("", text):
        raise UserError("prompt and prompt_track give different prompts for block 0; leave out one of them")
    return Prompt(0, text, text, track=entries)


def prefix_of(image: str | os.PathLike[str] | None, video: str | os.PathLike[str] | None) -> str:
    """Return the path of the prefix; empty for none.

    Raises:
        UserError: for two paths, or a file that does not exist.
    """
    if image is not None and video is not None:
        raise UserError("give image or video, not both")
    path = os.fspath(image or video or "")
    if path:
        check_prefix_exists(path)
    return path
