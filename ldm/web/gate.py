"""What stands before Gradio: only the page's own addresses, bodies of a limited size, nothing from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ldm.web.limits import MIB, folder_size

API = "/gradio_api"
PAGE = r"/|/(config|login_check|logout|login)/?|/(theme\.css|favicon\.ico|manifest\.json|robots\.txt)"
OPEN = {
    "GET": re.compile(
        rf"{PAGE}|/(assets|static|svelte)/.*"
        rf"|{API}/(info|app_id|user|token|login_check|startup-events|queue/status|theme\.css)/?"
        rf"|{API}/(heartbeat/\w+|queue/data|upload_progress|file=(?!https?:).*)"
    ),
    "POST": re.compile(rf"/login/?|{API}/(queue/join|run/predict|upload|component_server|cancel|reset)/?"),
}
LONGEST_JSON = 2 * MIB
FULL_AFTER = 20  # uploads of the largest size may lie about at once
POLICY = (  # the page fetches nothing from other places, and is shown inside of no other page
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; worker-src 'self' blob:; frame-ancestors 'self'"
)
HEADERS = ((b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"),
           (b"referrer-policy", b"no-referrer"))  # fmt: skip

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Gate:
    """ASGI middleware. It refuses in one line of text, with the status that says why.

    Args:
        max_upload: MiB of one file. uploads: the folder in which they lie.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_upload: int, uploads: Path) -> None:
        self.app, self.max_upload, self.uploads = app, max_upload * MIB, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in OPEN or not OPEN[method].fullmatch(scope["path"]):
            return await _refuse(send, 404, "There is no such page.")
        if method == "POST":
            status, reason, receive = await self._look(scope, receive)
            if status:
                return await _refuse(send, status, reason)
        await self.app(scope, receive, _with_headers(send))

    async def _look(self, scope: Scope, receive: Receive) -> tuple[int, str, Receive]:
        """(status, reason) of a body that is refused, or 0; and the body, to be read once more."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, "Say how long the body is.", receive
        files = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        if int(length) > (self.max_upload + MIB if files else LONGEST_JSON):
            return 413, f"That is too large; a file may have {self.max_upload // MIB} MiB.", receive
        if files:
            full = folder_size(self.uploads) + int(length) > FULL_AFTER * self.max_upload
            return (507, "Too many files were uploaded; try again in a while.", receive) if full else (0, "", receive)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        if fetches(body):
            return 400, "Files must be uploaded.", receive
        return 0, "", _again(body, receive)


def fetches(body: bytes) -> bool:
    """Whether JSON names a file by an address from which Gradio would download it."""
    try:
        found = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False  # what is no JSON is refused where it is read
    while found:
        value = found.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and re.match(r"\s*[a-z][a-z0-9+.-]+:", path, re.IGNORECASE):
                return True
            found += value.values()
        elif isinstance(value, list):
            found += value
    return False


def _again(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def read() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


def _with_headers(send: Send) -> Send:
    async def send_more(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await send(message)

    return send_more


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
