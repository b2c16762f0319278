"""Starting the page: what is in the way is said first, and nothing of anybody else's is touched."""

import argparse
import os
import socket
import tempfile
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.processes import alone_in
from ldm.web import serve
from tests.web.running import free_port


def options(folder: Path, port: int) -> argparse.Namespace:
    """Flags without a model: whatever comes as far as loading one fails otherwise."""
    return argparse.Namespace(outdir=str(folder), host="127.0.0.1", port=port)


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


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "[::1]", "::1"])
def test_addresses_to_serve_at(host: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    serve.check_port(host, free_port())


def test_a_folder_is_one_pages(tmp_path: Path, sent: Path) -> None:
    with alone_in(tmp_path), pytest.raises(UserError, match="another program is writing"):
        serve.serve(options(tmp_path, free_port()))
    assert sent.exists()


def test_only_the_pages_own_uploads_are_emptied(tmp_path: Path, sent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
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
