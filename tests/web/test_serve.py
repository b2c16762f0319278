"""Starting the page: what is in the way is said first, and nothing of anybody else's is touched."""

import argparse
import os
import socket
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import MagicMock

import gradio as gr
import pytest

from ldm import cli_sampling
from ldm.errors import UserError
from ldm.processes import alone_in
from ldm.web import limits, page, serve, studio, training
from tests.web.running import free_port


def options(folder: Path, port: int) -> argparse.Namespace:
    """Flags without a model: whatever comes as far as loading one fails otherwise."""
    return argparse.Namespace(outdir=str(folder), host="127.0.0.1", port=port)


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page sets for its process ends with the test."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """An upload of the page that has the folder."""
    path = tmp_path / serve.UPLOADS / "photo.png"
    path.parent.mkdir()
    path.write_bytes(b"photo")
    return path


def test_a_port_that_is_taken_is_said_before_anything_is_done(tmp_path: Path, sent: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UserError, match="--port"):
        serve.serve(options(tmp_path, listener.getsockname()[1]))
    assert sent.exists()


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "[::1]", "::1"])
def test_addresses_to_serve_at(host: str) -> None:
    without = pytest.raises(UserError, match="--port") if ":" in host and not has_ipv6() else nullcontext()
    with without:
        serve.check_port(host, free_port())


def test_a_folder_is_one_pages(tmp_path: Path, sent: Path) -> None:
    with alone_in(tmp_path), pytest.raises(UserError, match="another program is writing"):
        serve.serve(options(tmp_path, free_port()))
    assert sent.exists()


@pytest.mark.usefixtures("own_environment")
def test_only_the_pages_own_uploads_are_emptied(tmp_path: Path, sent: Path) -> None:
    mine = tmp_path / "uploads" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    uploads = serve.confine(tmp_path)
    assert uploads == sent.parent and not list(uploads.iterdir()) and mine.exists()
    assert tempfile.gettempdir() == str(uploads)
    uploads.rmdir()
    uploads.write_text("a file")
    with pytest.raises(UserError, match="cannot be emptied for uploads: Not a directory"):
        serve.confine(tmp_path)
    assert uploads.read_text() == "a file"


@pytest.mark.usefixtures("own_environment")
def test_the_end_waits_until_a_training_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works, blocks = MagicMock(), MagicMock()
    blocks.launch.return_value = None, "", None
    for module, name, value in (
        (cli_sampling, "load", (None, None)), (studio, "Studio", works), (page, "build", blocks),
        (gr, "set_static_paths", None), (limits, "limit_decoding", None), (serve, "_until_signal", None),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, MagicMock(return_value=value))
    flags = options(tmp_path, free_port())
    flags.auth, flags.max_upload, flags.open = None, 1, False
    serve.serve(flags)
    ((seconds,), _) = works.jobs.close.call_args
    assert seconds > training.GRACE
