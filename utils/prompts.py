"""Prompt files, and the file names of the videos."""

import hashlib
import html
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy

from utils.config_checks import MAX_VIDEOS
from utils.download_manifest import check_loaded
from utils.errors import UserError

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)  # Wan2.1's own negative prompt; its weights expect exactly this string
_NAME_CHARACTERS = 100  # characters of the prompt in a file name, as in Self-Forcing
_NAME_BYTES = 160  # leaves room for hash, number, sample and suffix within 200 bytes; file systems allow 255
_RESERVED = re.compile(r'[<>:"/\\|?*]+')  # forbidden in file names on Linux, macOS or Windows
_JOINERS = "\u200c\u200d"  # invisible characters that emoji and several scripts need


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        index: number of the prompt in its file, from 0. Blank lines are not counted.
        text: text to encode: the extended prompt if there is one, else the line.
        name: the line itself; it names the output files.
        image: path of the image that the video starts with; empty for none, or for one that all videos share.
        track: later prompts of the video, see `pipeline.prompt_track.track_entries`.
    """

    index: int
    text: str
    name: str
    image: str = ""
    track: tuple[tuple[int | str, str], ...] = ()

    @property
    def texts(self) -> list[str]:
        """The texts to encode: `text` and those of the track."""
        return [self.text, *(text for _, text in self.track)]


def read_prompts(path: str | os.PathLike[str], extended_path: str | os.PathLike[str] | None = None) -> list[Prompt]:
    """Read a UTF-8 prompt file with one prompt per line. Blank lines are skipped.

    Args:
        path: prompts, which also name the output files.
        extended_path: longer versions of the same prompts, on the same lines. They replace `text`, not `name`.

    Raises:
        UserError: if a file cannot be read, is not UTF-8 or has no prompts, or if the lines of the files do not match.
    """
    names = _read_lines(path)
    texts = names if extended_path is None else _read_lines(extended_path)
    if len(texts) != len(names):
        raise UserError(
            f"{path} has {len(names)} lines, but {extended_path} has {len(texts)}: "
            "write each extended prompt on the line of its prompt"
        )
    for number, (name, text) in enumerate(zip(names, texts, strict=True), 1):
        if bool(name) != bool(text):
            blank, other = (path, extended_path) if text else (extended_path, path)
            raise UserError(
                f"line {number} is blank in {blank} but not in {other}: write each extended prompt on the line of its "
                "prompt"
            )
    pairs = [(text, name) for text, name in zip(texts, names, strict=True) if name]
    return [Prompt(index, text, name) for index, (text, name) in enumerate(pairs)]


def clean_prompt(text: str) -> str:
    """Clean a prompt as Wan2.1 does before tokenising (`basic_clean` and `whitespace_clean` in its tokenizers.py).

    Repairs broken encodings (ftfy), unescapes HTML entities twice (web captions are often escaped twice), and
    collapses whitespace. The public weights were trained on prompts that were cleaned in this way.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def file_stem(prompt: Prompt, sample: int, save_with_index: bool = False) -> str:
    """Return the file name, without suffix, of one sample: `{prompt[:100]}-{sample}`, or `{index}-{sample}`.

    A prompt that is a safe file name is used unchanged. In any other prompt, unsafe characters are replaced or removed:
    path separators, reserved and control characters, leading dots and dashes. Long text is cut, and eight digits of a
    hash of the prompt are appended. The name has at most 200 bytes of UTF-8. Equal prompts have equal names: use
    `unique_stems` for the prompts of one run.
    """
    return f"{prompt.index if save_with_index else _safe(prompt.name)}-{sample}"


def unique_stems(prompts: Sequence[Prompt], num_samples: int, save_with_index: bool = False) -> list[list[str]]:
    """Return the file names of a whole prompt file as `stems[prompt.index][sample]`, distinct even if case is ignored.

    If an earlier prompt has the same name, " (2)", " (3)", ... is appended. A name depends only on earlier prompts, so
    more samples, more ranks or appended lines never rename an existing video. Each rank must pass all prompts of the
    file, not only its own.

    Raises:
        UserError: for more than `MAX_VIDEOS` names.
    """
    if len(prompts) * num_samples > MAX_VIDEOS:
        raise UserError(f"{len(prompts)} prompts with {num_samples} samples are more than {MAX_VIDEOS:,} videos")
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # the last number after each name, so that equal prompts take linear time
    stems = []
    for prompt in prompts:
        base = str(prompt.index) if save_with_index else _safe(prompt.name)
        key = _key(base)
        name, number = base, numbers.get(key, 1)
        while _key(name) in taken:
            number += 1
            name = f"{base} ({number})"
        taken.add(_key(name))
        numbers[key] = number
        stems.append([f"{name}-{sample}" for sample in range(num_samples)])
    return stems


def _read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the stripped lines of a file, without blank lines at its end."""
    path = Path(path)
    if path.suffix == ".gz":
        raise UserError(f"prompt file {path} is compressed: run gunzip {path}")
    if path.suffix in (".json", ".jsonl"):
        raise UserError(
            f"{path} is no text file with one prompt per line; --i2v reads JSON with images, "
            "--prompt_track prompts that change along a video"
        )
    check_loaded(path)
    try:
        with path.open(encoding="utf-8-sig") as file:  # -sig removes a byte order mark
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror}") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"prompt file {path} holds no prompts: write one prompt per line")
    return lines


def _safe(name: str) -> str:
    """Return `name` if it is a safe file name, else a safe version with a hash of the name."""
    text = re.sub(r"\s+", " ", name)  # before control characters are removed, because tabs separate words
    text = "".join(c for c in text if c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    text = _RESERVED.sub("_", text).lstrip(".-_ ")  # a leading dot hides a file, a leading dash looks like an option
    text = text[:_NAME_CHARACTERS].encode()[:_NAME_BYTES].decode(errors="ignore").rstrip()
    if text == name:
        return text
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{text or 'prompt'}-{digest}"


def _key(name: str) -> str:
    """Return a key that is equal for two names if some file system treats them as the same file."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
