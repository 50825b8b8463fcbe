"""Folders of video clips, and the captions of the clips."""

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from utils.clips import VIDEO_SUFFIXES
from utils.errors import UserError
from utils.text_pairs import read_text_pairs

CAPTIONS_FILE = "captions.json"
"""File in a folder of clips that holds their captions: {relative path: caption}."""
_PATH_KEYS = ("path", "video", "file_name", "filename", "file")
_CAPTION_KEYS = ("caption", "prompt", "text", "cap")


def find_video_names(folder: Path) -> list[str]:
    """Return the videos in a folder and its subfolders, as sorted relative paths with "/". Hidden files are left out.

    Raises:
        UserError: if the folder does not exist or holds no videos.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name a folder of videos")
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES]
    visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    names = sorted(path.as_posix() for path in visible if (folder / path).is_file())
    if not names:
        raise UserError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    return names


def read_captions(folder: Path, names: Sequence[str], file: Path | None = None) -> dict[str, str]:
    """Return the captions of videos by name; videos without a caption are absent.

    A caption belongs to the video of its path, with or without suffix, or to all videos in the folder of its path.
    Paths are compared in Unicode's composed form, because macOS decomposes umlauts in file names.

    Args:
        names: paths of the videos relative to `folder`.
        file: JSON {path: caption}, a JSON list of objects with the keys path and caption, or CSV with the columns path
            and caption. Default: captions.json in the folder, or else a .txt file beside each video.

    Raises:
        UserError: if the file is malformed, or names none of the videos.
    """
    if file is None and (folder / CAPTIONS_FILE).is_file():
        file = folder / CAPTIONS_FILE
    listed: Iterable[tuple[str, str | Path]] = _texts_beside(folder) if file is None else _listed(file)
    captions = {_key(path): caption for path, caption in listed}
    found = {name: caption for name in names if (caption := _caption_of(name, captions))}
    if file is not None and not found:
        example = next(iter(captions), "nothing")
        raise UserError(
            f"{file} has captions of none of the {len(names)} videos in {folder}: it names {example!r}, but the videos "
            f"have paths such as {names[0]!r}"
        )
    return found


def is_utf8(name: str) -> bool:
    """Return whether a file's name is UTF-8; other names cannot be printed or written to JSON."""
    return name == name.encode(errors="ignore").decode()


def _caption_of(name: str, captions: Mapping[str, str | Path]) -> str:
    """Return the caption of a video on one line; empty if it has none."""
    path = PurePosixPath(_key(name))
    candidates = (path, path.with_suffix(""), *path.parents[:-1])
    caption = next((captions[str(candidate)] for candidate in candidates if str(candidate) in captions), "")
    return " ".join((_read_text(caption) if isinstance(caption, Path) else caption).split())


def _key(path: str) -> str:
    return str(PurePosixPath(unicodedata.normalize("NFC", path.replace("\\", "/"))))


def _texts_beside(folder: Path) -> Iterable[tuple[str, Path]]:
    """Yield the .txt files in a folder and its subfolders, with their paths relative to it, without suffix."""
    for path in sorted(folder.rglob("*.txt")):
        if path.is_file() and not path.name.startswith("."):
            yield path.relative_to(folder).with_suffix("").as_posix(), path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read captions {path}: {error}; save it as UTF-8 text") from None


def _listed(file: Path) -> list[tuple[str, str]]:
    """Return the paths and captions in a JSON or CSV file."""
    if file.suffix.lower() == ".json":
        return read_text_pairs(file, "file of captions", ("a path", "a caption"), (_PATH_KEYS, _CAPTION_KEYS))
    if file.suffix.lower() == ".csv":
        return _from_csv(_read_text(file), file)
    raise UserError(f"{file} must be a JSON file {{path: caption}} or a CSV file with the columns path,caption")


def _from_csv(text: str, file: Path) -> list[tuple[str, str]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise UserError(f"{file} is not a valid CSV file: {error}") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    columns = [next((header.index(key) for key in keys if key in header), None) for keys in (_PATH_KEYS, _CAPTION_KEYS)]
    if None in columns:
        columns = [0, 1]
    else:
        rows = rows[1:]
    path, caption = columns
    assert path is not None and caption is not None
    for number, row in enumerate(rows):
        if len(row) <= max(path, caption):
            raise UserError(f"{file}: row {number} has no path and caption: {','.join(row)!r:.60}")
    return [(row[path], row[caption]) for row in rows]
