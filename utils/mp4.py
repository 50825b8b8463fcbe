"""Detection of incomplete mp4 files, without decoding them."""

import os
import struct
from pathlib import Path


def is_complete_mp4(path: Path) -> bool:
    """Return whether `path` is an mp4 file with an index and frames, and no byte is missing at its end.

    It reads only the headers of the top-level boxes (ISO/IEC 14496-12, section 4.2).
    """
    try:
        boxes = _box_sizes(path)
    except (OSError, struct.error, ValueError):
        return False
    return boxes.get("moov", 0) > 0 and boxes.get("mdat", 0) > 0


def _box_sizes(path: Path) -> dict[str, int]:
    """Return the bytes in each kind of top-level box, without headers; raise ValueError if one is cut off."""
    sizes: dict[str, int] = {}
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        while (start := file.tell()) < end:
            size, kind = struct.unpack(">I4s", file.read(8))
            header = 8
            if size == 1:  # a 64-bit size follows
                [size] = struct.unpack(">Q", file.read(8))
                header = 16
            elif size == 0:  # the box ends with the file
                size = end - start
            if size < header or start + size > end:
                raise ValueError(f"the box at byte {start} is cut off")
            sizes[kind.decode("latin-1")] = sizes.get(kind.decode("latin-1"), 0) + size - header
            file.seek(start + size)
    return sizes
