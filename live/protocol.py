"""Messages between a client and the server: their limits, their checks, and the binary layout of pictures.

A client sends JSON objects. The server sends JSON objects and binary pictures; docs/live.md lists all fields.
"""

import json
import struct
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from utils.errors import UserError

VERSION = 1
MAX_PROMPT = 1000  # characters
MAX_IMAGE = 4 * 2**20  # bytes of the file
MAX_IMAGE_SIDE = 4096  # pixels
MAX_TEXT = 16 * 2**10  # characters of a message without an image
MAX_MESSAGE = MAX_IMAGE * 4 // 3 + MAX_TEXT  # characters of a message with an image, in base64
MAX_SEED = 2**53 - 1  # JavaScript stores larger integers with rounding

ScheduleName = Literal["timestep_first", "block_first"]
RuleName = Literal["keep", "recache", "flush"]
Pace = Literal["realtime", "fast"]

PICTURE = struct.Struct("<BBHII")
"""Header of a picture: kind, format, index, block, frame; little-endian. JPEG bytes follow.

kind 1: a pixel frame; `index` is its number within the block, `frame` its number within the video.
kind 2: the x0 estimate of a block; `index` is the step that predicted it, `frame` is 0.
"""
FRAME, THUMBNAIL = 1, 2
JPEG = 1


@dataclass(frozen=True)
class Start:
    """A request for a generation."""

    prompt: str
    seed: int | None = None
    schedule: ScheduleName | None = None
    prompt_switch: RuleName | None = None
    image: str = ""
    """The start image: a PNG, JPEG or WebP file in base64. Empty: none."""
    pace: Pace = "realtime"
    """realtime: not faster than the video plays. fast: as fast as the device can."""


@dataclass(frozen=True)
class ChangePrompt:
    """A new prompt for the blocks that have not started."""

    prompt: str


@dataclass(frozen=True)
class Command:
    """A message without further fields. `hide` and `show` state whether anybody sees the page."""

    type: Literal["pause", "resume", "stop", "hide", "show"]


Message = Start | ChangePrompt | Command


def parse_message(text: str) -> Message:
    """Parse and check a message of a client.

    Raises:
        UserError: for anything that docs/live.md does not define. The message is one line.
    """
    if len(text) > MAX_MESSAGE:
        raise UserError(f"the message has {len(text)} characters; the limit is {MAX_MESSAGE}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("the message is not valid JSON") from None
    if not isinstance(content, dict):
        raise UserError("the message is not a JSON object")
    kind: Any = content.get("type")
    fields = {key: value for key, value in content.items() if key != "type"}
    if len(text) > MAX_TEXT and not (kind == "start" and fields.get("image")):
        raise UserError(f"the message has {len(text)} characters; without an image the limit is {MAX_TEXT}")
    if kind == "start":
        return _parse_start(fields)
    if kind == "prompt":
        _require_known(kind, fields, ("prompt",))
        return ChangePrompt(_parse_prompt(fields))
    if kind in get_args(Command.__annotations__["type"]):
        _require_known(kind, fields, ())
        return Command(kind)
    raise UserError(f"unknown type of message: {_short(kind)}")


def _parse_start(fields: dict[str, Any]) -> Start:
    _require_known("start", fields, ("prompt", "seed", "schedule", "prompt_switch", "image", "pace"))
    seed, image = fields.get("seed"), fields.get("image") or ""
    if seed is not None and not (type(seed) is int and 0 <= seed <= MAX_SEED):
        raise UserError(f"seed must be a whole number from 0 to {MAX_SEED}, not {_short(seed)}")
    if not isinstance(image, str):
        raise UserError("image must be a file in base64")
    return Start(
        _parse_prompt(fields),
        seed,
        _parse_choice(fields, "schedule", get_args(ScheduleName)),
        _parse_choice(fields, "prompt_switch", get_args(RuleName)),
        image,
        _parse_choice(fields, "pace", get_args(Pace)) or "realtime",
    )


def _parse_prompt(fields: dict[str, Any]) -> str:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise UserError("prompt must be text")
    prompt = " ".join(prompt.split())
    if not prompt:
        raise UserError("the prompt is empty: describe a video")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt has {len(prompt)} characters; the limit is {MAX_PROMPT}")
    if not prompt.isprintable():
        raise UserError("the prompt holds characters that cannot be printed")
    return prompt


def _parse_choice(fields: dict[str, Any], name: str, choices: tuple[Any, ...]) -> Any:
    value = fields.get(name)
    if value is not None and value not in choices:
        raise UserError(f"{name} must be {' or '.join(choices)}, not {_short(value)}")
    return value


def _require_known(kind: str, fields: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [name for name in fields if name not in known]:
        raise UserError(f"{kind} has no field {_short(unknown[0])}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---- Server to client ----


@dataclass(frozen=True)
class ModelInfo:
    """The loaded model and its video, as the page and `GET /v1/models` show them."""

    name: str
    fps: int
    width: int
    height: int
    sigmas: tuple[float, ...]
    """Noise levels 0..S, from the first step's input down to 0."""
    block_frames: int
    """Pixel frames of a block after the first."""
    schedule: ScheduleName
    rule: RuleName
    examples: tuple[str, ...]
    schedules: tuple[str, ...] = get_args(ScheduleName)
    rules: tuple[str, ...] = get_args(RuleName)
    context: str = "output"
    """Noise level of a timestep-first context: `output` or `input` of its step, or `clean`."""
    device: str = "cpu"
    features: tuple[str, ...] = field(default=("prompt", "image"))
    """What a running session offers: `prompt`: the prompt may change; `image`: a start image."""

    def hello(self) -> dict[str, Any]:
        """Return the first message to a client."""
        limits = {"prompt": MAX_PROMPT, "image": MAX_IMAGE, "message": MAX_MESSAGE}
        return {"type": "hello", "protocol": VERSION, **asdict(self), "steps": len(self.sigmas) - 1, "limits": limits}


def error_message(error: str) -> dict[str, Any]:
    """Return the reply to a bad message."""
    return {"type": "error", "message": " ".join(error.split())}


def pack_picture(kind: int, index: int, block: int, frame: int, jpeg: bytes) -> bytes:
    """Return a binary message: the header and a JPEG file."""
    return PICTURE.pack(kind, JPEG, index, block, frame) + jpeg
