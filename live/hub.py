"""The clients of a server and their generations: one at a time, in the order in which they came."""

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from live.generation import Engine, Generation
from live.images import save_image
from live.outbox import Outbox
from live.protocol import ChangePrompt, Command, Message, Start
from live.queue import DeviceQueue
from live.recordings import Recordings
from utils.errors import UserError

STALL_SECONDS = 5.0  # without a read; then the session pauses
TICK_SECONDS = 0.25
IDLE_SHARE = 0.1  # of the session's time limit: a session that is paused this long ends if others wait


@dataclass(frozen=True)
class Request:
    """A start that waits for the device."""

    start: Start
    name: str
    """Of the download; it cannot be guessed."""
    image: Path | None
    """The checked start image. It is kept beside the recording, because the metadata refers to it."""


@dataclass(eq=False)
class Client:
    """One connection."""

    outbox: Outbox
    generation: Generation | None = None
    request: Request | None = None  # waits for the device
    paused: bool = False  # by the user
    hidden: bool = False  # the page is not visible
    connected: bool = True


class Hub:
    """Gives the device to one client at a time. All methods run in the event loop."""

    def __init__(self, engine: Engine, folder: Path, session_seconds: float, max_clients: int):
        """
        Args:
            folder: folder of the recordings.
            session_seconds: time after which a session ends if others wait.
            max_clients: connections at once.
        """
        self.engine, self.session_seconds, self.max_clients = engine, session_seconds, max_clients
        self.recordings = Recordings(folder)
        self.queue: DeviceQueue[Client] = DeviceQueue(max_clients)
        self.clients: set[Client] = set()
        self.started_at = time.monotonic()
        self._loop = asyncio.get_running_loop()

    # ---- Connections ----

    def connect(self) -> Client:
        """Return a new client; its outbox holds the hello.

        Raises:
            UserError: if there are too many.
        """
        if len(self.clients) >= self.max_clients:
            raise UserError(f"{self.max_clients} clients are connected, which is the limit; try again later")
        client = Client(Outbox(self._loop))
        self.clients.add(client)
        client.outbox.reply(self.engine.info.hello())
        return client

    def disconnect(self, client: Client) -> None:
        """Free all that a client holds: its place in the queue, or the device after the op under way."""
        client.connected = False
        self.clients.discard(client)
        self._drop_request(client)
        if client.generation is not None:
            client.generation.stop("disconnected")
        self._announce()

    async def receive(self, client: Client, message: Message) -> None:
        """Carry out a message.

        Raises:
            UserError: with the reply to a message that cannot be carried out.
        """
        match message:
            case Start():
                await self._request(client, message)
            case ChangePrompt(prompt):
                if client.generation is None:
                    raise UserError("no session is running: send start first")
                client.generation.change_prompt(prompt)
            case Command("stop"):
                self._stop(client)
            case Command("pause" | "resume" as kind):
                client.paused = kind == "pause"
                self._update_pause(client)
            case Command("hide" | "show" as kind):
                client.hidden = kind == "hide"
                self._update_pause(client)

    # ---- Generations ----

    async def _request(self, client: Client, start: Start) -> None:
        info, name, image = self.engine.info, secrets.token_urlsafe(16), None
        if start.prompt_switch not in (None, *info.rules):
            raise UserError(f"this server's rules at a new prompt: {', '.join(info.rules)}")
        if start.image:
            if "image" not in info.features:
                raise UserError("this model has no start images; leave out image")
            image = self.recordings.path(name, ".png")
            await asyncio.to_thread(save_image, start.image, image)
        if not client.connected:
            if image is not None:
                image.unlink(missing_ok=True)
            return
        self._drop_request(client, keep_place=True)
        client.paused = False
        client.request = Request(start, name, image)
        if client.generation is not None:
            client.generation.stop("restarted")  # its end queues the new request
            return
        try:
            self.queue.enter(client)
        except UserError:
            self._drop_request(client)
            raise
        self._announce()
        self._serve_next()

    def _stop(self, client: Client) -> None:
        if client.generation is not None:
            self._drop_request(client)
            client.generation.stop("stopped")
        elif client.request is not None:
            self._drop_request(client)
            client.outbox.reply({"type": "ended", "reason": "stopped", "frames": 0})
            self._announce()

    def _drop_request(self, client: Client, keep_place: bool = False) -> None:
        if client.request is not None and client.request.image is not None:
            client.request.image.unlink(missing_ok=True)
        client.request = None
        if not keep_place:
            self.queue.leave(client)

    def _serve_next(self) -> None:
        client = self.queue.next_holder()
        if client is None:
            return
        assert client.request is not None
        request, client.request = client.request, None
        client.outbox.forget_events()
        image = None if request.image is None else str(request.image)
        generation = Generation(
            self.engine, request.start, request.name, image, client.outbox, self.recordings, self._on_end
        )
        client.generation = generation
        client.outbox.reply(self._started(generation))
        self._announce()
        generation.start()

    def _started(self, generation: Generation) -> dict[str, Any]:
        start, info = generation.start_request, self.engine.info
        return {
            "type": "started",
            "prompt": start.prompt,
            "seed": generation.seed,
            "schedule": start.schedule or info.schedule,
            "prompt_switch": start.prompt_switch or info.rule,
            "pace": start.pace,
            "download": f"/download/{generation.name}.mp4",
            "metadata": f"/download/{generation.name}.json",
        }

    def _on_end(self, generation: Generation, reason: str, message: str) -> None:
        """Called in the generation's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
            self._loop.call_soon_threadsafe(self._ended, generation, reason, message)

    def _ended(self, generation: Generation, reason: str, message: str) -> None:
        client = self.queue.holder
        assert client is not None and client.generation is generation
        client.generation = None
        self.queue.release(client)
        if generation.image_path is not None and not generation.num_frames:
            Path(generation.image_path).unlink(missing_ok=True)
        if client.connected:
            ended: dict[str, Any] = {"type": "ended", "reason": reason, "frames": generation.num_frames}
            client.outbox.reply(ended | ({"message": message} if message else {}))
            if client.request is not None:
                with contextlib.suppress(UserError):
                    self.queue.enter(client)
        self._serve_next()
        self._announce()

    def _announce(self) -> None:
        """Send every waiting client its place."""
        for position, client in enumerate(self.queue.waiting, start=1):
            client.outbox.reply({"type": "queue", "position": position, "waiting": len(self.queue.waiting)})

    # ---- The clock ----

    async def watch(self) -> None:
        """Pause sessions without a viewer and end those that last too long, until the task is cancelled."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            client = self.queue.holder
            if client is not None and client.generation is not None:
                self._update_pause(client)
                if self.queue.waiting and (reason := self._overdue(client.generation)):
                    client.generation.stop(reason)

    def _update_pause(self, client: Client) -> None:
        if client.generation is not None:
            stalled = client.outbox.stalled_seconds() > STALL_SECONDS
            client.generation.set_paused(client.paused or client.hidden or stalled)

    def _overdue(self, generation: Generation) -> str:
        now = time.monotonic()
        if now - generation.started_at > self.session_seconds:
            return "timeout"
        paused_at = generation.paused_at
        idle = paused_at is not None and now - paused_at > IDLE_SHARE * self.session_seconds
        return "idle" if idle else ""

    def end_generations(self) -> list[Generation]:
        """End all generations after the ops under way, and return them. Returns at once."""
        clients = [*self.clients, *([self.queue.holder] if self.queue.holder else [])]
        generations = [client.generation for client in clients if client.generation is not None]
        for generation in generations:
            generation.stop("server stopped")
        return generations

    def close(self, seconds: float) -> None:
        """End all generations; wait for them, but at most this long."""
        deadline = time.monotonic() + seconds
        for generation in self.end_generations():
            generation.join(max(0.0, deadline - time.monotonic()))

    def health(self) -> dict[str, Any]:
        """Return the state of the server, for `GET /health`."""
        holder = self.queue.holder
        generation = holder.generation if holder is not None else None
        state = "idle" if generation is None else "paused" if generation.paused_at is not None else "running"
        return {
            "status": "ok",
            "model": self.engine.info.name,
            "state": state,
            "clients": len(self.clients),
            "waiting": len(self.queue.waiting),
            "uptime": round(time.monotonic() - self.started_at, 1),
        }
