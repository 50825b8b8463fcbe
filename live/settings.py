"""Address and limits of the server. This module imports nothing heavy, so that wrong flags are reported at once."""

import re
import socket
from dataclasses import dataclass
from importlib.util import find_spec

from utils.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Address and limits of a server."""

    host: str = "127.0.0.1"
    port: int = 7860
    token: str = ""
    """Clients must send it. Required on any address but the loopback ones."""
    session_seconds: float = 600.0
    """A session ends after this time if another client waits."""
    max_clients: int = 64
    folder: str = "outputs/live"
    """Folder of the recordings."""

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can connect."""
        return self.host in LOOPBACK

    def check(self) -> None:
        """Check the address and the limits.

        Raises:
            UserError: for the first that cannot work.
        """
        if not self.is_local and len(self.token) < 8:
            raise UserError(f"--host {self.host} opens the server to other machines: add --token with 8 characters")
        if not re.fullmatch(r"[A-Za-z0-9_-]*", self.token):
            raise UserError("--token may hold letters, digits, - and _ only")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port must be from 0 to 65535, not {self.port}")
        if not self.session_seconds > 0:
            raise UserError("--session_minutes must be above 0")

    def check_port(self) -> None:
        """Check that the address is free, before a model is loaded.

        Raises:
            UserError: if it is not, or not an address of this machine.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server sets it
                probe.bind((self.host, self.port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {self.host}:{self.port} ({error.strerror}); choose another --host or --port"
            ) from None


def check_packages() -> None:
    """Check that the packages of requirements-demo.txt are installed.

    Raises:
        UserError: with the command that installs them.
    """
    if missing := [name for name in ("starlette", "uvicorn", "websockets") if find_spec(name) is None]:
        raise UserError(
            f"{', '.join(missing)} is not installed: pip install -r requirements-demo.txt, or use make live"
        )
