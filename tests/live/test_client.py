"""The client in docs/live.md runs; its tables name the messages that exist."""

import json
import sys
from pathlib import Path

from live_clients import receive, start
from PIL import Image

from live.protocol import Start

PAGE = (Path(__file__).parents[2] / "docs/live.md").read_text(encoding="utf-8")


def test_the_client_of_the_page_saves_fifty_frames(server, tmp_path, monkeypatch, capsys):
    [client] = [part.partition("```")[0] for part in PAGE.split("```python\n")[1:]]
    assert len([line for line in client.splitlines() if line and "import" not in line]) <= 20
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["client.py", server.url.replace("http", "ws") + "/ws"])
    exec(compile(client.replace("connect(url)", "connect(url, close_timeout=0.2)"), "docs/live.md", "exec"), {})
    assert capsys.readouterr().out == "shapes 64x64\n"
    files = sorted(tmp_path.glob("*.jpg"))
    assert [file.name for file in files] == [f"frame_{index:04}.jpg" for index in range(50)]
    with Image.open(files[-1]) as frame:
        assert frame.size == (64, 64)


def test_the_page_lists_all_fields(server):
    fields = {}
    with server.connect() as client:
        hello = receive(client, "hello")
        start(client)
        fields = {kind: receive(client, kind) for kind in ("started", "op", "block")}
    for kind, message in {"hello": hello, **fields}.items():
        [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{kind}` |")]
        assert not [name for name in message if name != "type" and f"`{name}`" not in row], json.dumps(message)
    assert all(f"| `{name}` |" in PAGE for name in Start.__dataclass_fields__)
