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
FILES = re.compile(rf"/login/?|{API}/upload/?")  # what else is posted is JSON
ONCE = (b"content-type", b"content-length", b"sec-fetch-site")  # of a repeated one, others may read another value
LONGEST_JSON = 2 * MIB
FULL_AFTER = 20  # uploads of the largest size may lie about at once
MOST_REQUESTS = 400  # at once: every open page holds one or two
MOST_JSON = 32 * MIB  # of bodies that are being read
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
        self.requests = 0  # that are being answered
        self.coming = {True: 0, False: 0}  # bytes that are being sent: files, and JSON

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in OPEN or not OPEN[method].fullmatch(scope["path"]):
            return await _refuse(send, 404, "There is no such page.")
        if self.requests >= MOST_REQUESTS:
            return await _refuse(send, 503, "Too many requests at once; try again in a while.")
        self.requests += 1
        try:
            await (self._post if method == "POST" else self.app)(scope, receive, _with_headers(send))
        finally:
            self.requests -= 1

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what has a body, if that may be."""
        names = [name for name, _ in scope["headers"]]
        if any(names.count(name) > 1 for name in ONCE):
            return await _refuse(send, 400, "A header was sent twice.")
        headers = dict(scope["headers"])
        if headers.get(b"sec-fetch-site") == b"cross-site":  # browsers say so, and no page can have them lie
            return await _refuse(send, 403, "This was sent by another page.")
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, "Say how long the body is.")
        form = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        files, size = form and bool(FILES.fullmatch(scope["path"])), int(length)
        if size > (self.max_upload + MIB if files else LONGEST_JSON):
            return await _refuse(send, 413, f"That is too large; a file may have {self.max_upload // MIB} MiB.")
        lying = folder_size(self.uploads) if files else 0
        if lying + self.coming[files] + size > (FULL_AFTER * self.max_upload if files else MOST_JSON):
            return await _refuse(send, 507, "Too much was sent at once; try again in a while.")
        self.coming[files] += size
        try:
            if not files:
                body = await _read(receive)
                if fetches(body):
                    return await _refuse(send, 400, "Files must be uploaded.")
                receive = _again(body, receive)
            await self.app(scope, receive, send)
        finally:
            self.coming[files] -= size


async def _read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body"):
            return body


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
