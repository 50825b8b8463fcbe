"""The server under good and bad clients: nothing hangs, nothing grows, and one generation runs at a time."""

import base64
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import EXAMPLES, FakeEngine
from live_clients import Running, receive, send, start, wait_until
from test_messages import MALFORMED, picture
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import live.hub
from live.outbox import MAX_BYTES
from live.protocol import FRAME, MAX_MESSAGE, PICTURE, THUMBNAIL
from live.server import LiveServer
from live.settings import Settings
from utils.errors import UserError


def wait_for_idle(server: Running) -> None:
    wait_until(lambda: server.health()["state"] == "idle" and not server.health()["clients"])


# ---- One client ----


def test_a_session_sends_ops_pictures_and_blocks(server):
    with server.connect() as client:
        hello = receive(client, "hello")
        assert (hello["fps"], hello["steps"], hello["protocol"]) == (16, 4, 1) and hello["examples"] == [*EXAMPLES]
        start(client, seed=5, schedule="block_first", prompt_switch="flush", pace="fast")
        started = receive(client, "started")
        assert (started["seed"], started["schedule"], started["prompt_switch"]) == (5, "block_first", "flush")
        ops, frames, thumbnails, blocks = [], [], [], []
        while len(blocks) < 3:
            message = client.recv(timeout=5)
            if isinstance(message, bytes):
                kind, _, index, block, frame = PICTURE.unpack(message[:12])
                assert message[12:14] == b"\xff\xd8"
                (frames if kind == FRAME else thumbnails).append((block, index, frame))
                assert kind in (FRAME, THUMBNAIL)
            elif (content := json.loads(message))["type"] == "op":
                ops.append((content["kind"], content["block"], content["step"]))
            else:
                blocks.append(content)
    assert ops[:5] == [*(("denoise", 0, step) for step in range(4)), ("write", 0, 4)]
    assert [block["frames"] for block in blocks] == [9, 21, 33] and blocks[0]["prompt"] == EXAMPLES[0]
    assert frames[:10] == [*((0, index, index) for index in range(9)), (1, 0, 9)]
    assert thumbnails[:4] == [(0, step, 0) for step in range(4)]
    wait_for_idle(server)


def test_a_new_prompt_holds_for_the_next_block_that_has_not_started(server):
    with server.connect() as client:
        send(client, "prompt", prompt=EXAMPLES[1])
        assert "send start first" in receive(client, "error")["message"]
        start(client, pace="fast")
        assert receive(client, "block")["prompt"] == EXAMPLES[0]
        send(client, "prompt", prompt=EXAMPLES[1])
        wait_until(lambda: receive(client, "block")["prompt"] == EXAMPLES[1])
    wait_for_idle(server)


def test_pause_hide_and_stop(server):
    with server.connect() as client:
        start(client, pace="fast")
        receive(client, "block")
        for stop, go in (("pause", "resume"), ("hide", "show")):
            send(client, stop)
            wait_until(lambda: server.health()["state"] == "paused")
            send(client, go)
            wait_until(lambda: server.health()["state"] == "running")
        send(client, "stop")
        assert receive(client, "ended")["reason"] == "stopped"
        send(client, "stop")  # nothing runs: no reply, no error
        start(client)
        assert receive(client, "started")["download"]
    wait_for_idle(server)


def test_real_time_is_not_exceeded_and_fast_is(server):
    with server.connect() as client:
        rates = {}
        for pace in ("realtime", "fast"):
            start(client, pace=pace)
            receive(client, "started")
            begin = time.monotonic()
            while time.monotonic() < begin + 0.6:
                rates[pace] = receive(client, "block")["frames"]
    assert rates["realtime"] <= 16 * 0.6 + 9 + 2 * 12 and rates["fast"] > 2 * rates["realtime"]
    wait_for_idle(server)


def test_recordings_are_downloaded_during_and_after_a_session(server):
    with server.connect() as client:
        start(client)
        started = receive(client, "started")
        receive(client, "block")
        status, headers, body = server.get(started["download"])
        assert status == 200 and headers["content-type"] == "video/mp4" and body.startswith(b"mp4 of")
        send(client, "stop")
        receive(client, "ended")
    assert server.get(started["download"])[0] == server.get(started["metadata"])[0] == 200
    for path in ("/download/x.mp4", "/download/..%2f..%2fREADME.md", f"{started['download']}.txt", "/download/.lock"):
        assert server.get(path)[0] == 404
    wait_for_idle(server)


def test_a_start_image_is_checked(server):
    with server.connect() as client:
        start(client, image=base64.b64encode(b"no image").decode())
        assert "cannot be read" in receive(client, "error")["message"]
        start(client, image=base64.b64encode(picture("PNG")).decode())
        receive(client, "block")
    wait_for_idle(server)


# ---- Bad clients ----


def test_malformed_messages_get_one_error_each_and_the_session_goes_on(server):
    with server.connect() as client:
        start(client)
        receive(client, "block")
        for text, _ in MALFORMED:
            client.send(text)
            assert "Traceback" not in receive(client, "error")["message"]
        client.send(b"binary")
        assert "binary" in receive(client, "error")["message"]
        assert receive(client, "block")["frames"] and server.health()["state"] == "running"
        with pytest.raises(ConnectionClosed):
            client.send("x" * (MAX_MESSAGE + 3 * 2**20))
            while True:
                client.recv(timeout=5)
    wait_for_idle(server)


def test_a_hundred_prompts_a_second_do_no_harm(server):
    with server.connect() as client:
        start(client, pace="fast")
        receive(client, "block")
        for index in range(100):
            send(client, "prompt", prompt=f"prompt {index}")
        send(client, "prompt", prompt=EXAMPLES[2])
        wait_until(lambda: receive(client, "block")["prompt"] == EXAMPLES[2])
        assert len(server.engine.sessions[-1].prompts) < 10
    wait_for_idle(server)


def test_a_client_that_vanishes_frees_its_session(server):
    client = server.connect()
    start(client)
    receive(client, "block")
    session = server.engine.sessions[-1]
    client.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
    wait_for_idle(server)
    assert session.closed


def test_twenty_clients_take_turns(server):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(20)]
        for client in clients:
            start(client)
        receive(clients[0], "started")
        assert [receive(client, "queue")["position"] for client in clients[1:]] == [*range(1, 20)]
        assert server.health()["waiting"] == 19 and len([s for s in server.engine.sessions if not s.closed]) == 1
        send(clients[1], "stop")  # leaves the queue
        assert receive(clients[1], "ended")["frames"] == 0
        for client in (clients[0], *clients[2:]):
            assert receive(client, "block")["new_frames"] == 9
            send(client, "stop")
            assert receive(client, "ended")["reason"] == "stopped"
    wait_for_idle(server)


def test_a_slow_reader_loses_frames_and_the_session_pauses(run_server, monkeypatch):
    monkeypatch.setattr(live.hub, "STALL_SECONDS", 0.3)
    server = run_server(FakeEngine(size=512))
    with server.connect(max_queue=1) as client:  # reads nothing after that many messages
        start(client, pace="fast", prompt="noise")  # large files
        wait_until(lambda: server.health()["state"] == "paused", 20)
        [state] = server.server.hub.clients
        [session] = server.engine.sessions
        time.sleep(0.3)  # for the block under way
        blocks = session.num_blocks
        time.sleep(0.3)
        assert session.num_blocks == blocks and state.outbox.num_bytes <= MAX_BYTES
        wait_until(lambda: receive(client, "block")["frames"] > 0)
    wait_for_idle(server)


def test_a_failure_reaches_the_client_without_its_cause(run_server, capfd):
    server = run_server(FakeEngine(fail_at=2))
    with server.connect() as client:
        start(client, pace="fast")
        ended = receive(client, "ended")
        assert ended["reason"] == "error" and "secret" not in json.dumps(ended) and "log" in ended["message"]
        assert "a secret of the server" in capfd.readouterr().err
        start(client)
        receive(client, "started")


def test_a_session_ends_after_its_time_if_others_wait(run_server):
    server = run_server(session_seconds=0.5)
    with server.connect() as first, server.connect() as second:
        start(first)
        receive(first, "started")
        time.sleep(0.6)
        assert server.health()["state"] == "running"  # nobody else waits
        start(second)
        assert receive(first, "ended")["reason"] == "timeout"
        receive(second, "block")


def test_too_many_clients_are_refused(run_server):
    server = run_server(max_clients=2)
    with server.connect() as one, server.connect() as two, server.connect() as three:
        receive(one, "hello")
        receive(two, "hello")
        assert "limit" in receive(three, "error")["message"]
        with pytest.raises(ConnectionClosed):
            three.recv(timeout=5)


# ---- HTTP and security ----


def test_pages_models_and_health(server):
    status, headers, body = server.get("/")
    assert status == 200 and b"HiAR" in body and "default-src 'self'" in headers["content-security-policy"]
    for name in ("app.js", "grid.js", "style.css", "icon.svg"):
        assert server.get(f"/static/{name}")[0] == 200
    [model] = json.loads(server.get("/v1/models")[2])["data"]
    assert model["id"] == "shapes" and model["object"] == "model" and model["sigmas"][0] == 1.0
    assert server.health()["status"] == "ok"
    assert server.get("/static/..%2fserver.py")[0] == server.get("/nothing")[0] == 404


def test_the_page_loads_nothing_from_elsewhere():
    """Its files name no other server; the policy in the headers forbids it, too."""
    files = list((Path(live.hub.__file__).parent / "static").iterdir())
    assert len(files) >= 8
    for file in files:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"""(https?:|(src|href)=["']?|url\(["']?|import[^\n]*["'])//""", text), file
        assert len(text.splitlines()) <= 400


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:1", "http://localhost"])
def test_other_origins_are_refused(server, origin):
    with pytest.raises(InvalidStatus), server.connect(origin=origin):
        pass
    assert server.get("/v1/models", Origin=origin)[0] == 403


def test_the_own_origin_is_accepted(server):
    with server.connect(origin=server.url) as client:
        receive(client, "hello")
    wait_for_idle(server)


def test_a_foreign_name_of_this_machine_is_refused(server):
    host = f"evil.example:{server.server.port}"
    assert server.get("/v1/models", Host=host)[0] == server.get("/", Host=host, Origin=f"http://{host}")[0] == 403
    assert server.get("/health", Host=f"localhost:{server.server.port}")[0] == 200


def test_a_token_is_required(run_server):
    server = run_server(token="a-long-secret")
    for query in ("", "?token=", "?token=wrong", "?token=%C3%A4"):
        with pytest.raises(InvalidStatus), server.connect(query):
            pass
        assert server.get(f"/v1/models{query}")[0] == 401
    with server.connect("?token=a-long-secret") as client:
        receive(client, "hello")
    with server.connect(additional_headers={"Authorization": "Bearer a-long-secret"}) as client:
        receive(client, "hello")
    assert server.get("/v1/models?token=a-long-secret")[0] == server.get("/health")[0] == 200


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"host": "0.0.0.0"}, "--token"),
        ({"host": "0.0.0.0", "token": "short"}, "--token"),
        ({"host": "192.168.1.7"}, "--token"),
        ({"token": "with space"}, "--token"),
        ({"port": 70000}, "--port"),
        ({"session_seconds": 0.0}, "--session_minutes"),
        ({"session_seconds": float("nan")}, "--session_minutes"),
    ],
)
def test_wrong_settings_are_one_line(settings, part):
    with pytest.raises(UserError, match=part):
        LiveServer(FakeEngine(), Settings(**settings))


def test_a_port_and_a_folder_in_use_are_one_line(server, tmp_path):
    with pytest.raises(UserError, match="cannot listen"):
        LiveServer(FakeEngine(), Settings(port=server.server.port, folder=str(tmp_path))).run()
    with pytest.raises(UserError, match="another process"):
        LiveServer(FakeEngine(), Settings(port=0, folder=server.server.settings.folder)).run()


# ---- The end ----

PROGRAM = """
import sys
sys.path[:0] = {path!r}
from fake_engine import FakeEngine
from live.server import LiveServer, serve
from live.settings import Settings
from utils.errors import command
command(lambda: serve(FakeEngine(op_seconds=float(sys.argv[1])), Settings(port={port}, folder={folder!r})))()
"""


def free_port() -> int:
    """Return a port below those of outgoing connections: a test that connects too early would meet itself."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture
def start_process(tmp_path):
    """start_process(seconds per op) starts a server in another process; return it and a connected client."""
    port = free_port()
    folder = tmp_path / "live"
    folder.mkdir()
    path = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    program = PROGRAM.format(path=path, port=port, folder=str(folder))
    processes: list[subprocess.Popen] = []

    def run(op_seconds: float) -> tuple[subprocess.Popen, str, Path]:
        processes.append(
            subprocess.Popen([sys.executable, "-c", program, str(op_seconds)], stderr=subprocess.PIPE, text=True)
        )

        def listens() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens, 60)
        return processes[-1], f"ws://127.0.0.1:{port}/ws", folder

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_a_server_is_killed_starts_again_and_ends_with_ctrl_c(start_process):
    process, address, folder = start_process(op_seconds=0)
    with connect(address, close_timeout=0.2) as client:
        start(client)
        receive(client, "block")
        send(client, "stop")
        receive(client, "ended")
        process.kill()
        with pytest.raises(ConnectionClosed):
            while True:
                client.recv(timeout=5)
    process.wait()  # the port is free again
    assert list(folder.glob("live-*.mp4"))
    (folder / "hiar-recording-x").mkdir()  # as a session of the pipeline leaves it
    (folder / "cat.mp4").touch()  # not a file of the server
    process, address, _ = start_process(op_seconds=30)
    with connect(address, close_timeout=0.2) as client:
        start(client)
        receive(client, "started")
        assert {file.name for file in folder.iterdir()} == {".lock", "cat.mp4"}
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)  # during a pass of 30 seconds
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - begin < 4 and process.returncode == 0 and not errors  # 2 s without other work
