"""Videos of sessions for download: of running ones as far as they are, of ended ones the last few."""

import re
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

KEPT = 8
SUFFIXES = (".mp4", ".json")
_OWN_FILE = re.compile(r"\.*live-[\w-]{22}\..+")  # with partial files and locks; names as `Hub` draws them


class Recordings:
    """The last few sessions and their files in one folder.

    Only this object writes to the folder; the server locks it. Files of an earlier server are deleted at the start.
    """

    def __init__(self, folder: Path, kept: int = KEPT):
        """
        Args:
            folder: an existing folder.
            kept: number of sessions that keep their files.
        """
        self._folder, self._kept = folder, kept
        self._sessions: OrderedDict[str, Any] = OrderedDict()  # None: ended, its files are complete
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        for file in folder.iterdir():
            if _OWN_FILE.fullmatch(file.name):
                file.unlink(missing_ok=True)
            elif file.name.startswith("hiar-recording-"):  # of a session of a killed server
                shutil.rmtree(file, ignore_errors=True)

    def add(self, name: str, session: Any) -> None:
        """Add a session that has frames; delete the files of the oldest ones."""
        with self._lock:
            self._sessions[name] = session
            self._locks[name] = threading.Lock()
            ended = [other for other, running in self._sessions.items() if running is None]
            for other in ended[: max(0, len(self._sessions) - self._kept)]:
                del self._sessions[other], self._locks[other]
                for suffix in (*SUFFIXES, ".png"):
                    self.path(other, suffix).unlink(missing_ok=True)

    def finish(self, name: str) -> None:
        """Write the files of a session that ends, and drop the session. Does nothing for an unknown name."""
        lock = self._locks.get(name)
        if lock is None:
            return
        with lock:
            session, self._sessions[name] = self._sessions[name], None
            if session is not None:
                session.save(str(self.path(name, ".mp4")))

    def file(self, name: str, suffix: str) -> Path | None:
        """Return the path of a session's mp4 or JSON file; None if there is none. A running session is saved first.

        Raises:
            UserError: if the session cannot be saved.
        """
        lock = self._locks.get(name)
        if lock is None or suffix not in SUFFIXES:
            return None
        with lock:
            session = self._sessions.get(name)
            if session is not None:
                session.save(str(self.path(name, ".mp4")))
        path = self.path(name, suffix)
        return path if path.is_file() else None

    def path(self, name: str, suffix: str) -> Path:
        """Return the path of a file of the session `name`. The suffix .png is that of its start image."""
        return self._folder / f"live-{name}{suffix}"
