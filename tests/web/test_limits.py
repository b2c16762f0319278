"""Values from a browser: whatever comes, it is within the limits or refused in one line."""

import asyncio
import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.web import gate, limits
from ldm.web.gate import fetches


@pytest.mark.parametrize(
    "value", [None, "7", True, [], {}, math.nan, math.inf, -math.inf, 10**400, 0, 101, 1e9, -5, 2.5, b"3"]
)
def test_no_number_beyond_the_limits_comes_through(value: Any) -> None:
    with pytest.raises(UserError, match="^Steps"):
        limits.whole("Steps", value, 1, 100)


def test_numbers_within_the_limits_do() -> None:
    assert limits.whole("Steps", 20.0, 1, 100) == 20
    assert limits.number("Guidance", 7.5, 0, 50) == 7.5


def test_texts_are_short_and_can_be_written() -> None:
    assert limits.text("Prompt", "  a red\x00 circle\ud800 ") == "a red circle?"
    for value in (3, ["a"], "a" * 3000):
        with pytest.raises(UserError, match="^Prompt"):
            limits.text("Prompt", value)


@pytest.mark.parametrize("word", ["", " ", "../../etc", "-rf", "dog; rm", "a=b", "[unet]", "x" * 60, None, 7])
def test_class_words_are_words(word: Any) -> None:
    with pytest.raises(UserError, match="^Class word"):
        limits.class_word(word)


@pytest.mark.parametrize("word", ["dog", "coffee mug", "Kätzchen", "T-shirt"])
def test_of_any_language(word: str) -> None:
    assert limits.class_word(f" {word} ") == word


def huge_png() -> bytes:
    """A PNG of few bytes that says it has 60000x60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_images_are_images_of_known_formats_and_sizes(tmp_path: Path) -> None:
    good = Image.new("RGB", (40, 30), "red")
    written = {kind: io.BytesIO() for kind in ("PNG", "JPEG", "GIF", "TIFF")}
    for kind, file in written.items():
        good.save(file, kind)
    refused = {
        "huge.png": huge_png(),
        "cut.png": written["PNG"].getvalue()[:60],
        "moving.png": written["GIF"].getvalue(),
        "pages.png": written["TIFF"].getvalue(),
        "empty.png": b"",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, content in refused.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="^Image: "):
            limits.open_image("Image", tmp_path / name)
    for path in ("", None, tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match="^Image: "):
            limits.open_image("Image", path)
    (tmp_path / "good").write_bytes(written["JPEG"].getvalue())
    assert limits.open_image("Image", tmp_path / "good").size == (40, 30)
    for mode, kind, kept in (("CMYK", "JPEG", "RGB"), ("P", "PNG", "RGB"), ("LA", "PNG", "RGBA"), ("1", "BMP", "RGB")):
        good.convert("L" if mode == "LA" else "RGB").convert(mode).save(tmp_path / "odd", kind)
        odd = limits.open_image("Image", tmp_path / "odd")
        assert odd.mode == kept and odd.size == (40, 30), "what cameras and drawing programs write"


def test_a_folder_that_is_full_takes_no_more(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0" * 2000)
    limits.Limits(max_size=64).check_room(tmp_path)
    with pytest.raises(UserError, match="--max_folder"):
        limits.Limits(max_size=64, max_folder=1e-6).check_room(tmp_path)


def test_addresses_to_download_are_told_from_uploads() -> None:
    assert not fetches(b'{"data": [{"path": "/x/uploads/a.png", "url": "http://127.0.0.1:7860/file=a.png"}]}')
    assert not fetches(b"no json") and not fetches(b"")
    for path in ("http://10.0.0.1/x", "HTTPS://a", "ftp://x", "FILE:///etc/passwd", " http://x", "data:image/png,x"):
        assert fetches(b'{"data": [[{"image": {"path": "%s"}}]]}' % path.encode()), path
    assert not fetches(b"[" * 100_000), "depth does no harm"


@pytest.mark.parametrize(
    ("kind", "size", "passed"),
    [
        (b"multipart/form-data; boundary=x", limits.MIB, gate.FULL_AFTER),
        (b"application/json", gate.LONGEST_JSON, gate.MOST_JSON // gate.LONGEST_JSON),
        (b"application/json", 2, gate.MOST_REQUESTS),
    ],
)
def test_what_is_sent_at_once_has_a_limit(tmp_path: Path, kind: bytes, size: int, passed: int) -> None:
    async def flood() -> tuple[int, list[int]]:
        inside, refused, go = 0, [], asyncio.Event()

        async def app(*_: Any) -> None:
            nonlocal inside
            inside += 1
            await go.wait()

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                refused.append(message["status"])

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}"}

        door = gate.Gate(app, 1, tmp_path)
        headers = [(b"content-type", kind), (b"content-length", str(size).encode())]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
        requests = [asyncio.create_task(door(scope, receive, send)) for _ in range(passed + 3)]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*requests)
        assert door.requests == 0 and not any(door.coming.values())
        return inside, refused

    inside, refused = asyncio.run(flood())
    assert inside == passed and len(refused) == 3 and set(refused) <= {503, 507}


FORM, JSON = (b"content-type", b"multipart/form-data; boundary=x"), (b"content-type", b"application/json")
CROSS = (b"sec-fetch-site", b"cross-site")


@pytest.mark.parametrize(
    ("path", "headers", "length", "answer"),
    [
        ("upload", [FORM], gate.LONGEST_JSON + 1, "passed on"),
        ("queue/join", [JSON, FORM], 50, "A header was sent twice."),
        ("queue/join", [JSON, (b"content-length", b"0")], 50, "A header was sent twice."),
        ("queue/join", [JSON, CROSS, (b"sec-fetch-site", b"same-site")], 50, "A header was sent twice."),
        ("queue/join", [FORM], 50, "Files must be uploaded."),
        ("queue/join", [FORM], gate.LONGEST_JSON + 1, "That is too large; a file may have 3 MiB."),
    ],
)
def test_only_uploads_and_logins_are_forms_and_headers_come_once(
    tmp_path: Path, path: str, headers: list[tuple[bytes, bytes]], length: int, answer: str
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.body", "body": b"passed on"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"data": [{"path": "http://10.0.0.1/x"}]}'}

    said = []

    async def send(message: dict[str, Any]) -> None:
        said.append(message.get("body", b"").decode())

    headers = [*headers, (b"content-length", str(length).encode())]
    scope = {"type": "http", "method": "POST", "path": f"/gradio_api/{path}", "headers": headers}
    asyncio.run(gate.Gate(app, 3, tmp_path)(scope, receive, send))
    assert said[-1] == answer
