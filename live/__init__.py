"""Live video in a browser: a server, its WebSocket protocol and its page; docs/live.md specifies them."""
