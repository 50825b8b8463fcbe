"""Messages of clients: each is understood or refused with one line. Also the outbox, the queue and start images."""

import asyncio
import base64
import io
import json
import struct
import threading

import numpy as np
import pytest
from PIL import Image

from live.images import save_image
from live.outbox import MAX_EVENTS, MAX_REPLIES, Outbox
from live.protocol import (
    FRAME,
    JPEG,
    MAX_IMAGE,
    MAX_MESSAGE,
    MAX_PROMPT,
    MAX_TEXT,
    PICTURE,
    ChangePrompt,
    Command,
    Start,
    pack_picture,
    parse_message,
)
from live.queue import DeviceQueue
from utils.errors import UserError

MALFORMED: list[tuple[str, str]] = [
    ("", "JSON"),
    ("{", "JSON"),
    ("start", "JSON"),
    ("[" * 5000, "JSON"),
    ('{"type": "start"', "JSON"),
    ("\x00", "JSON"),
    ("null", "object"),
    ("[]", "object"),
    ("3", "object"),
    ('"start"', "object"),
    ("{}", "unknown type"),
    ('{"type": null}', "unknown type"),
    ('{"type": 3}', "unknown type"),
    ('{"type": []}', "unknown type"),
    ('{"type": {"a": 1}}', "unknown type"),
    ('{"type": "Start", "prompt": "a"}', "unknown type"),
    ('{"type": "hello"}', "unknown type"),
    ('{"type": "%s"}' % ("x" * 500), "unknown type"),
    ('{"type": "start"}', "prompt must be text"),
    ('{"type": "start", "prompt": null}', "prompt must be text"),
    ('{"type": "start", "prompt": 3}', "prompt must be text"),
    ('{"type": "start", "prompt": ["a"]}', "prompt must be text"),
    ('{"type": "start", "prompt": ""}', "empty"),
    ('{"type": "start", "prompt": " \\n\\t "}', "empty"),
    ('{"type": "start", "prompt": "a\\u0000b"}', "printed"),
    ('{"type": "start", "prompt": "a\\u001b[31mb"}', "printed"),
    ('{"type": "start", "prompt": "\\ud800"}', "printed"),
    ('{"type": "start", "prompt": "%s"}' % ("x" * (MAX_PROMPT + 1)), "the limit is"),
    ('{"type": "start", "prompt": "%s"}' % ("x" * MAX_TEXT), "without an image"),
    ('{"type": "start", "prompt": "a", "seed": -1}', "seed"),
    ('{"type": "start", "prompt": "a", "seed": 1.5}', "seed"),
    ('{"type": "start", "prompt": "a", "seed": true}', "seed"),
    ('{"type": "start", "prompt": "a", "seed": "7"}', "seed"),
    ('{"type": "start", "prompt": "a", "seed": 1e400}', "seed"),
    ('{"type": "start", "prompt": "a", "seed": NaN}', "seed"),
    ('{"type": "start", "prompt": "a", "seed": 9007199254740992}', "seed"),
    ('{"type": "start", "prompt": "a", "seed": %s}' % ("9" * 5000), ""),
    ('{"type": "start", "prompt": "a", "schedule": "bidirectional"}', "schedule"),
    ('{"type": "start", "prompt": "a", "schedule": 1}', "schedule"),
    ('{"type": "start", "prompt": "a", "schedule": {}}', "schedule"),
    ('{"type": "start", "prompt": "a", "prompt_switch": "forget"}', "prompt_switch"),
    ('{"type": "start", "prompt": "a", "pace": "slow"}', "pace"),
    ('{"type": "start", "prompt": "a", "image": 3}', "image"),
    ('{"type": "start", "prompt": "a", "path": "/etc/passwd"}', "no field"),
    ('{"type": "prompt"}', "prompt must be text"),
    ('{"type": "prompt", "prompt": ""}', "empty"),
    ('{"type": "prompt", "prompt": "a", "seed": 1}', "no field"),
    ('{"type": "pause", "seconds": 3}', "no field"),
    ('{"type": "stop", "all": true}', "no field"),
    ('{"type": "prompt", "prompt": "%s"}' % ("x" * MAX_TEXT), "without an image"),
    ('{"type": "stop", "image": "%s"}' % ("x" * MAX_TEXT), "without an image"),
    ("x" * (MAX_MESSAGE + 1), "the limit is"),
]


@pytest.mark.parametrize(("text", "part"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_message_is_one_line(text, part):
    with pytest.raises(UserError) as error:
        parse_message(text)
    line = str(error.value)
    assert part in line and "\n" not in line and len(line) < 200
    json.dumps(line).encode()


def test_messages_are_understood():
    fields = {
        "prompt": " a  red\ncircle ",
        "seed": 5,
        "schedule": "block_first",
        "prompt_switch": "flush",
        "pace": "fast",
    }
    start = Start("a red circle", 5, "block_first", "flush", "", "fast")
    assert parse_message(json.dumps({"type": "start", **fields})) == start
    assert parse_message('{"type": "start", "prompt": "a", "seed": null}') == Start("a")
    assert parse_message('{"type": "prompt", "prompt": "b"}') == ChangePrompt("b")
    for kind in ("pause", "resume", "stop", "hide", "show"):
        assert parse_message(json.dumps({"type": kind})) == Command(kind)


def test_a_picture_has_a_header_of_twelve_bytes():
    message = pack_picture(FRAME, 3, 7, 84, b"jpeg")
    assert PICTURE.size == 12 and PICTURE.unpack(message[:12]) == (FRAME, JPEG, 3, 7, 84) and message[12:] == b"jpeg"


# ---- Outbox ----


async def drain(outbox: Outbox) -> list:
    """Return all messages that wait."""
    taken = []
    while True:
        try:
            taken.append(await asyncio.wait_for(outbox.take(), 0.01))
        except TimeoutError:
            return taken


def test_a_slow_client_loses_the_oldest_pictures_but_no_reply():
    async def run() -> tuple[list, Outbox]:
        outbox = Outbox(asyncio.get_running_loop(), max_bytes=1000)
        for index in range(50):
            outbox.add(bytes([index]) * 100, is_frame=True)
            if index == 0:
                outbox.reply({"type": "started"})
        assert outbox.num_bytes <= 1000
        return await drain(outbox), outbox

    taken, outbox = asyncio.run(run())
    assert taken[0] == '{"type": "started"}'
    assert [payload[0] for payload in taken[1:]] == [*range(40, 50)] and outbox.dropped_frames == 40


def test_small_events_are_counted_too():
    async def run() -> list:
        outbox = Outbox(asyncio.get_running_loop())
        for index in range(MAX_EVENTS + 10):
            outbox.add({"type": "op", "index": index})
        return await drain(outbox)

    taken = asyncio.run(run())
    assert len(taken) == MAX_EVENTS and json.loads(taken[0])["index"] == 10


def test_a_client_that_reads_no_replies_is_not_read_either():
    async def run() -> None:
        outbox = Outbox(asyncio.get_running_loop())
        for _ in range(MAX_REPLIES):
            await asyncio.wait_for(outbox.room(), 0.1)
            outbox.reply({"type": "error"})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(outbox.room(), 0.02)
        await outbox.take()
        await asyncio.wait_for(outbox.room(), 0.1)

    asyncio.run(run())


def test_only_the_newest_queue_position_waits():
    async def run() -> list:
        outbox = Outbox(asyncio.get_running_loop())
        for position in (3, 2, 1):
            outbox.reply({"type": "queue", "position": position})
        return await drain(outbox)

    assert asyncio.run(run()) == ['{"type": "queue", "position": 1}']


def test_events_of_another_thread_keep_their_order():
    async def run() -> list:
        outbox = Outbox(asyncio.get_running_loop())
        thread = threading.Thread(target=lambda: [outbox.add(str(index)) for index in range(200)])
        thread.start()
        return [int(await outbox.take()) for _ in range(200)]

    assert asyncio.run(run()) == [*range(200)]


def test_pictures_after_the_end_of_the_server_are_no_error():
    async def new_outbox() -> Outbox:
        return Outbox(asyncio.get_running_loop())

    asyncio.run(new_outbox()).add(b"picture")  # a session's thread ends after the event loop


# ---- Queue ----


def test_the_queue_is_first_come_first_served():
    queue: DeviceQueue[str] = DeviceQueue(max_waiting=2)
    queue.enter("a")
    assert queue.next_holder() == "a" and queue.next_holder() is None
    queue.enter("b")
    queue.enter("c")
    queue.enter("b")  # keeps its place
    with pytest.raises(UserError, match="full"):
        queue.enter("d")
    assert queue.next_holder() is None
    queue.release("a")
    assert queue.leave("b") and not queue.leave("b")
    assert queue.next_holder() == "c" and queue.holder == "c"


# ---- Start images ----


def picture(kind: str, size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 40, 30)).save(file, kind)
    return file.getvalue()


def picture_with_broken_exif() -> bytes:
    """Return a JPEG file that is to be rotated, with text in the place of its width."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x0100, 2, 1, b"ab")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_start_image_becomes_a_png_file(tmp_path, kind):
    save_image(base64.b64encode(picture(kind)).decode(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and np.abs(np.asarray(image).mean((0, 1)) - (200, 40, 30)).max() < 6


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "cannot be read"),
        (b"GIF89a" + bytes(20), "cannot be read"),
        (picture("BMP"), "cannot be read"),
        (picture("TIFF"), "cannot be read"),
        (picture("PNG")[:50], "cannot be read"),
        (picture("JPEG")[:80], "cannot be read"),
        (picture_with_broken_exif(), "cannot be read"),
        (picture("PNG", (5000, 2)), "pixels"),
        (bytes(MAX_IMAGE + 1), "bytes"),
    ],
)
def test_a_wrong_start_image_is_one_line(tmp_path, data, part):
    with pytest.raises(UserError, match=part):
        save_image(base64.b64encode(data).decode(), tmp_path / "a.png")


def test_base64_is_checked(tmp_path):
    with pytest.raises(UserError, match="base64"):
        save_image("no base64!", tmp_path / "a.png")
