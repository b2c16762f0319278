"""Requests that mean no good, by HTTP against the running page: it goes on serving, and writes nowhere else."""

import json
import math
import threading
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.web.running import ROOT, Running, tree, until
from tests.web.test_limits import huge_png

FLOOD = 40
PATHS = [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/gradio_api/file=%2Fetc%2Fpasswd",
    "/gradio_api/file=..%2f..%2f..%2fetc%2fpasswd", "/gradio_api/file=" + str(ROOT / "pyproject.toml"),
    "/gradio_api/file=" + str(ROOT / "models/tiny/model.safetensors"), "/gradio_api/file=FILE:///etc/passwd",
    "/gradio_api/file=http://127.0.0.1:9/", "/gradio_api/file=https://example.org/a.png", "/file=/etc/passwd",
    "/gradio_api/proxy=http://127.0.0.1:9/", "/gradio_api/deep_link?session_hash=x", "/gradio_api/openapi.json",
    "/docs", "/openapi.json", "/monitoring", "/gradio_api/runs", "/gradio_api/vibe-code", "/dev/reload",
    "/assets/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/static/../../routes.py",
    "/gradio_api/custom_component/1/client/component/../../../../etc/passwd", "/\x00", "/" + "a" * 5000,
    "/gradio_api/stream/x/1/1/playlist.m3u8", "/svelte/../../../../../../etc/passwd",
]  # fmt: skip


class Client:
    """Speaks to the page as its browser part does."""

    def __init__(self, page: Running) -> None:
        self.http = httpx.Client(base_url=page.address, timeout=60)
        assert self.http.post("/login", data={"username": "ann", "password": "secret"}).status_code == 200
        self.config = self.http.get("/config").json()
        self.handlers = {d["api_name"]: d for d in self.config["dependencies"] if d.get("api_name")}
        self.components = {c["id"]: c for c in self.config["components"]}

    def usual(self, name: str) -> list[Any]:
        """The values that a handler's inputs have on a fresh page."""
        return [self.components[i]["props"].get("value") for i in self.handlers[name]["inputs"]]

    def labels(self, name: str) -> list[str]:
        """The labels of a handler's inputs."""
        return [self.components[i]["props"].get("label") for i in self.handlers[name]["inputs"]]

    def call(self, name: str, data: Any) -> dict[str, Any]:
        """What a handler answers: {"success": ..., "output": ...}."""
        session, handler = uuid.uuid4().hex[:11], self.handlers[name]
        body = {"data": data, "fn_index": handler["id"], "session_hash": session, "event_data": None}
        if not handler["queue"]:
            answer = self.http.post("/gradio_api/run/predict", json=body)
            return {"success": answer.status_code == 200, "output": answer.json()}
        answer = self.http.post("/gradio_api/queue/join", content=json.dumps(body), headers=JSON)
        if answer.status_code != 200:
            return {"success": False, "output": answer.text}
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
            for line in events.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("no answer")

    def draw(self, **changes: Any) -> dict[str, Any]:
        """Ask for a small picture in few steps, some settings other than usual."""
        labels = self.labels("draw")
        values = dict(zip(labels, self.usual("draw"), strict=True)) | {"Steps": 2, "Width": 32, "Height": 32} | changes
        return self.call("draw", [values[label] for label in labels])


JSON = {"content-type": "application/json"}


def refused(answer: dict[str, Any]) -> bool:
    """Whether a handler said no, in a line and without a traceback."""
    text = json.dumps(answer)
    assert "Traceback" not in text and "site-packages" not in text
    return not answer["success"]


def hostile_values(client: Client) -> list[Callable[[], bool]]:
    """Handlers called with what no page would send."""
    text, n = client.labels("draw"), len(client.usual("draw"))
    assert {"Width", "Sampler", "Prompt", "Adapter 1"} <= set(text)
    wrong: list[dict[str, Any]] = [
        {"Width": 10**9, "Height": 10**9}, {"Width": -64}, {"Width": "64; rm -rf /"}, {"Width": math.nan},
        {"Height": [64]}, {"Steps": 10**6}, {"Steps": None}, {"Pictures": 10**6}, {"Seed": -(2**70)},
        {"Seed": "x" * 1000}, {"Guidance": math.inf}, {"Sampler": "../../etc/passwd"}, {"Sampler": {"a": 1}},
        {"Schedule": "no such"}, {"Prompt": "a" * 100_000},
        {"Adapter 1": "../../../../etc"}, {"Adapter 1": str(ROOT / "models/tiny/model.safetensors")}, {"Eta": 99},
    ]  # fmt: skip
    calls = [lambda changes=changes: refused(client.draw(**changes)) for changes in wrong]
    for path in ("/etc/passwd", str(ROOT / "docs"), "http://127.0.0.1:9/a.png", "data:image/png;base64,AAAA", "../x"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for name in ("draw_1", "draw_2"):
            values = client.usual(name)
            where = client.labels(name).index("Image")
            values[where] = file
            calls.append(lambda name=name, values=values: refused(client.call(name, values)))
        photos = [[{"image": file, "caption": None}], "dog", "LoRA", 2, 0, 1, None, 0, ""]
        calls.append(lambda photos=photos: refused(client.call("start", photos)))
    calls += [lambda word=word: refused(client.call("start", [None, word, "LoRA", 2, 0, 1, None, 0, ""]))
              for word in ("../../x", "--seed", "dog")]  # fmt: skip
    calls += [lambda way=way: refused(client.call("usual_steps", [way])) for way in ("../../x", None, {"a": 1})]
    calls += [lambda data=data: refused(client.call("draw", data)) for data in ([], [None] * n, [[]] * (n + 5), "x")]
    calls += [lambda name=name: refused(client.call(name, [{"a": 1}])) for name in ("again", "start_from", "again_1")]
    return calls


def hostile_bodies(client: Client, page: Running) -> list[Callable[[], bool]]:
    """Uploads and bodies that are too large, odd, or of the wrong kind."""
    post = client.http.post
    join, upload = "/gradio_api/queue/join", "/gradio_api/upload"

    def status(*args: Any, **kwargs: Any) -> Callable[[], bool]:
        def send() -> bool:
            try:
                return 400 <= post(*args, **kwargs).status_code < 600
            except httpx.TransportError:  # it hangs up on a body that it does not want
                return True

        return send

    def stays_inside(name: str, content: bytes) -> Callable[[], bool]:
        def send() -> bool:
            answer = post(upload, files={"files": (name, content)})
            inside = str(page.outdir / ".uploads")
            return answer.status_code >= 400 or all(path.startswith(inside) for path in answer.json())

        return send

    return [
        status(upload, files={"files": ("a.png", b"0" * (3 << 20))}),
        status(upload, content=b"x", headers={"content-type": "text/plain"}),
        status(upload, content=b"x", headers={"content-type": "multipart/form-data"}),
        status(join, content=b"[" * 50_000, headers=JSON),
        status(join, content=b'{"data": ["' + b"a" * (3 << 20) + b'"]}', headers=JSON),
        status(join, content=b"\xff\xfe\x00", headers=JSON),
        status(join, content=(part for part in [b"{}"]), headers=JSON),
        status(join, json={"data": [], "fn_index": 10**9, "session_hash": "x"}),
        status(join, json={"data": [], "fn_index": -1, "session_hash": "../../x"}),
        status(join, json={"data": [], "fn_index": 0, "session_hash": "x"}, headers={"sec-fetch-site": "cross-site"}),
        status("/gradio_api/run/draw", json={"data": []}),
        status("/gradio_api/api/look", json={"data": []}),
        status("/gradio_api/process_recording", files={"video": ("a.mp4", b"0")}),
        status("/gradio_api/vibe-edit/", json={"prompt": "x"}),
        status(
            "/gradio_api/component_server", json={"session_hash": "x", "component_id": 10**9, "fn_name": "__init__"}
        ),
        status("/gradio_api/component_server", json={"session_hash": "x", "component_id": 1, "fn_name": "postprocess"}),
        lambda: client.http.request("DELETE", "/gradio_api/upload").status_code == 404,
        lambda: client.http.request("PUT", "/config", content=b"x").status_code == 404,
        stays_inside("../../../evil.png", b"x"),
        stays_inside("/etc/cron.d/evil", b"x"),
        stays_inside("a\x00b/../../c.png", b"x"),
        stays_inside("x" * 3000 + ".png", b"x"),
        stays_inside("page.html", b"<script>alert(1)</script>"),
    ]


def bad_images(client: Client) -> list[Callable[[], bool]]:
    """Files that were uploaded as they should, and are no pictures."""

    def use(name: str, content: bytes) -> Callable[[], bool]:
        def send() -> bool:
            (path,) = client.http.post("/gradio_api/upload", files={"files": (name, content)}).json()
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            values = client.usual("draw_1")
            values[client.labels("draw_1").index("Image")] = file
            brushed = client.usual("draw_2")
            brushed[client.labels("draw_2").index("Image")] = file
            photos = [[{"image": file, "caption": None}], "dog", "LoRA", 2, 0, 1, None, 0, ""]
            answers = [client.call("draw_1", values), client.call("draw_2", brushed), client.call("start", photos)]
            return all(refused(answer) for answer in answers)

        return send

    return [use("huge.png", huge_png()), use("text.png", b"no picture"), use("empty.png", b""),
            use("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")]  # fmt: skip


def test_fifty_hostile_requests_leave_it_serving(page: Running) -> None:
    before = tree(ROOT)
    a_password_is_asked_for(page)
    client = Client(page)
    requests = [lambda path=path: _not_served(client, path) for path in PATHS]
    requests += hostile_values(client) + hostile_bodies(client, page) + bad_images(client)
    assert len(requests) >= 50
    held = [request() for request in requests]
    assert all(held), [i for i, held_out in enumerate(held) if not held_out]
    pictures = drawn(page)
    full = _flood(client)
    assert full > 0, "the queue is limited"
    assert client.http.get("/").status_code == 200
    until(lambda: drawn(page) == pictures + FLOOD - full, 120)
    assert client.draw(Prompt="a small blue star on a white background", Seed=7)["success"]
    until(lambda: drawn(page) == pictures + FLOOD - full + 1, 60)
    assert page.process.poll() is None
    assert tree(ROOT) == before


def drawn(page: Running) -> int:
    """How many pictures there are."""
    return len(list((page.outdir / "pictures").glob("*.png")))


def _not_served(client: Client, path: str) -> bool:
    try:
        answer = client.http.get(httpx.URL(client.http.base_url, raw_path=path.encode()))
    except (httpx.InvalidURL, httpx.RemoteProtocolError):
        return True
    assert "root:" not in answer.text and "requires-python" not in answer.text
    return answer.status_code >= 400


def _flood(client: Client) -> int:
    """Ask for many pictures at once; returns how many were refused."""
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(refused(client.draw()))) for _ in range(FLOOD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == FLOOD
    return sum(answers)


def a_password_is_asked_for(page: Running) -> None:
    http = httpx.Client(base_url=page.address, timeout=60)
    picture = page.outdir / "pictures" / "09999.txt"
    picture.write_bytes(b"")
    assert http.get("/config").status_code == 401
    assert http.get(f"/gradio_api/file={picture}").status_code == 401
    assert http.post("/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
    assert http.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
    picture.unlink()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "--port"),
        (["--auth", "ann"], "--auth"),
        (["--max_queue", "0"], "--max_queue"),
        (["--adapters", "no/such"], "--adapters"),
        (["--train_base", "no.yaml"], "--train_base"),
        (["--ckpt", "no.ckpt"], "--ckpt"),
    ],
)
def test_flags_are_checked_first(words: list[str], said: str) -> None:
    from tests.programs import run

    result = run("scripts/webui.py", *words)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1
