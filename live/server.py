"""The web server: routes, the WebSocket, and the rules for connections."""

import asyncio
import contextlib
import hmac
import json
import os
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from live.generation import Engine
from live.hub import Client, Hub
from live.protocol import MAX_MESSAGE, error_message, parse_message
from live.settings import LOOPBACK, Settings
from utils.errors import UserError
from utils.files import writable_folder
from utils.locks import lock_folder

STATIC = Path(__file__).parent / "static"
CLOSE_SECONDS = 0.5  # for sessions to end at Ctrl-C
EXIT_SECONDS = 1.4  # from Ctrl-C to the end of the process, at most
SLACK = 2 * 2**20  # bytes above MAX_MESSAGE that still get an error instead of a closed connection
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' ws: wss:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


# ---- Routes ----


def create_app(engine: Engine, settings: Settings, on_hub: Callable[[Hub], None] = lambda hub: None) -> ASGIApp:
    """Return the ASGI application. `on_hub` receives the hub when the server starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        hub = Hub(engine, Path(settings.folder), settings.session_seconds, settings.max_clients)
        app.state.hub, app.state.settings = hub, settings
        on_hub(hub)
        watcher = asyncio.create_task(hub.watch())
        yield
        watcher.cancel()

    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html")),
        Route("/health", _health),
        Route("/v1/models", _models),
        Route("/download/{file}", _download),
        WebSocketRoute("/ws", _socket),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return _Guard(Starlette(routes=routes, lifespan=lifespan), settings)


async def _health(request: Request) -> Response:
    return JSONResponse(request.app.state.hub.health())


async def _models(request: Request) -> Response:
    if not _has_token(request):
        return JSONResponse({"error": "the token is missing or wrong"}, 401)
    fields = {key: value for key, value in request.app.state.hub.engine.info.hello().items() if key != "type"}
    return JSONResponse({"object": "list", "data": [{"id": fields["name"], "object": "model", **fields}]})


async def _download(request: Request) -> Response:
    """Send a recording. Its name is a secret of the client, so it needs no token."""
    name, suffix = os.path.splitext(request.path_params["file"])
    try:
        path = await run_in_threadpool(request.app.state.hub.recordings.file, name, suffix)
    except UserError as error:
        return JSONResponse({"error": str(error)}, 404)
    if path is None:
        return JSONResponse({"error": "no such recording; only the last few are kept"}, 404)
    return FileResponse(path, filename=f"hiar-live{suffix}")


async def _socket(websocket: WebSocket) -> None:
    if not _has_token(websocket):
        await websocket.close(4401)
        return
    await websocket.accept()
    hub: Hub = websocket.app.state.hub
    try:
        client = hub.connect()
    except UserError as error:
        await websocket.send_text(json.dumps(error_message(str(error))))
        await websocket.close(1013)
        return
    tasks = [asyncio.create_task(_receive(websocket, hub, client)), asyncio.create_task(_send(websocket, client))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hub.disconnect(client)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, (WebSocketDisconnect, RuntimeError, OSError)):
                raise result


async def _receive(websocket: WebSocket, hub: Hub, client: Client) -> None:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        await client.outbox.room()
        try:
            if message.get("text") is None:
                raise UserError("messages are JSON text, not binary")
            await hub.receive(client, parse_message(message["text"]))
        except UserError as error:
            client.outbox.reply(error_message(str(error)))


async def _send(websocket: WebSocket, client: Client) -> None:
    while True:
        payload = await client.outbox.take()
        if isinstance(payload, bytes):
            await websocket.send_bytes(payload)
        else:
            await websocket.send_text(payload)


# ---- Who may connect ----


def _has_token(connection: HTTPConnection) -> bool:
    """Return whether a request has the token, as `?token=` or as a bearer token."""
    token: str = connection.app.state.settings.token
    bearer = connection.headers.get("authorization", "")
    given = connection.query_params.get("token") or bearer.removeprefix("Bearer ")
    return not token or hmac.compare_digest(given.encode(), token.encode())


class _Guard:
    """Refuses requests that another web page causes, and adds headers for browsers.

    A page of another origin may not connect. Without a token, only loopback names are served, so that a foreign name
    that resolves to this machine is refused (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if error := self._refusal(HTTPConnection(scope)):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": error})
            else:
                await JSONResponse({"error": error}, 403)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, connection: HTTPConnection) -> str:
        host = connection.headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if not self.settings.token and name.strip("[]") not in LOOPBACK:
            return "this server has no token, so it serves its own machine only"
        origin = connection.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return "pages of other origins may not connect"
        return ""


# ---- Running ----


class LiveServer:
    """A server in this process. `run` blocks until Ctrl-C; tests run it in a thread and call `stop`."""

    def __init__(self, engine: Engine, settings: Settings, server_class: type[uvicorn.Server] = uvicorn.Server):
        settings.check()
        self.settings = settings
        self.hub: Hub | None = None
        config = uvicorn.Config(
            create_app(engine, settings, self._set_hub),
            settings.host,
            settings.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="websockets-sansio",
            ws_max_size=MAX_MESSAGE + SLACK,
            ws_ping_interval=5.0,
            ws_ping_timeout=15.0,
            limit_concurrency=2 * settings.max_clients + 64,
            timeout_graceful_shutdown=1,
        )
        self._server = server_class(config)
        if isinstance(self._server, _Process):
            self._server.on_exit = self.end_generations

    @property
    def port(self) -> int:
        """The port of a running server."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    @property
    def started(self) -> bool:
        """Whether the server accepts connections."""
        return self._server.started

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM, then end all sessions.

        Raises:
            UserError: if another server uses the folder or the port.
        """
        with self._locked_folder():
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after an orderly end
                try:
                    self._server.run()
                except SystemExit:
                    address = f"{self.settings.host}:{self.settings.port}"
                    raise UserError(f"cannot listen on {address}; choose another --host or --port") from None
            if self.hub is not None:
                self.hub.close(CLOSE_SECONDS)

    def stop(self) -> None:
        """End `run` from another thread."""
        self._server.should_exit = True

    def end_generations(self) -> None:
        """End all generations after the ops under way. Returns at once."""
        if self.hub is not None:
            self.hub.end_generations()

    @contextlib.contextmanager
    def _locked_folder(self) -> Iterator[None]:
        folder = writable_folder(self.settings.folder)
        with lock_folder(folder, "serving live video from", keep=False):
            yield

    def _set_hub(self, hub: Hub) -> None:
        self.hub = hub


class _Process(uvicorn.Server):
    """A server that ends its process soon after Ctrl-C, whatever its threads do.

    A signal handler runs between two instructions of the main thread, which may hold a lock. So the handler only writes
    to a pipe, and a waiting thread does the rest.
    """

    on_exit: Callable[[], None]

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self._reader, self._writer = os.pipe()
        threading.Thread(target=self._end_process, name="end of the process", daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called at Ctrl-C and SIGTERM."""
        os.write(self._writer, b"!")
        super().handle_exit(sig, frame)

    def _end_process(self) -> None:
        os.read(self._reader, 1)
        threading.Timer(EXIT_SECONDS, os._exit, (0,)).start()
        self.on_exit()


def serve(engine: Engine, settings: Settings) -> None:
    """Serve until Ctrl-C, which ends the process within 2 seconds, also during a long pass of the network."""
    server = LiveServer(engine, settings, _Process)
    # Sessions write their frames to temporary files. After kill -9, the next server finds and deletes them there.
    tempfile.tempdir = str(writable_folder(settings.folder).resolve())
    print(f"{engine.info.name} on {engine.info.device}: open {page_url(settings)} (Ctrl-C ends the server)", flush=True)
    server.run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of a session may be inside a long pass, and an ordinary end waits for it


def page_url(settings: Settings) -> str:
    """Return the address of the page for a browser."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}/" + (f"?token={settings.token}" if settings.token else "")
