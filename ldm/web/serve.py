"""Starting and ending the page's program."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from ldm import cli_sampling
from ldm.errors import UserError
from ldm.processes import alone_in

UPLOADS = ".uploads"


def confine(folder: Path) -> Path:
    """Have everything that Gradio, uploads and libraries write on the way lie in `folder`; to be called first.

    Returns:
        The folder of uploads, which is emptied.

    Raises:
        UserError: it cannot be, since it is no folder, or somebody else's.
    """
    uploads = folder / UPLOADS
    try:
        if os.path.lexists(uploads):
            shutil.rmtree(uploads)
        uploads.mkdir()
    except OSError as error:
        raise UserError(f"{uploads} cannot be emptied for uploads: {error.strerror or error}") from error
    for name in ("GRADIO_TEMP_DIR", "TMPDIR"):
        os.environ[name] = str(uploads)
    tempfile.tempdir = str(uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    return uploads


def check_port(host: str, port: int) -> None:
    """Raise UserError when no page can be opened there, before time goes into loading a model."""
    address = host.strip("[]")
    try:
        socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        raise _not_opened(host, port, error) from error


def _not_opened(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"--port {port}: cannot be opened on {host}: {error}")


def serve(options: argparse.Namespace) -> None:
    """Load the model, open the page, and serve it until a signal comes.

    Raises:
        UserError: a file or setting is wrong, gradio is not installed, the port is taken, or another page has the
            folder.
    """
    check_port(options.host, options.port)
    folder = Path(options.outdir).resolve()
    with alone_in(folder):
        _serve(options, folder)


def _serve(options: argparse.Namespace, folder: Path) -> None:
    uploads = confine(folder)
    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("the page needs gradio: pip install 'ldm[web]'") from error
    from starlette.middleware import Middleware

    from ldm.web import brush, limits, look, page
    from ldm.web.gate import Gate
    from ldm.web.studio import Studio
    from ldm.web.training import GRACE

    model, protection = cli_sampling.load(options, {})
    limits.limit_decoding()
    studio = Studio(options, model, protection)
    gr.set_static_paths([studio.gallery.pictures, studio.gallery.inputs])
    blocks = page.build(studio)
    blocks.queue(api_open=False, max_size=64, default_concurrency_limit=2)
    name, _, password = (options.auth or "").partition(":")
    try:
        _, address, _ = blocks.launch(
            server_name=options.host, server_port=options.port, auth=(name, password) if options.auth else None,
            prevent_thread_lock=True, quiet=True, show_error=False, share=False, inbrowser=options.open,
            max_file_size=options.max_upload * limits.MIB, enable_monitoring=False, ssr_mode=False, pwa=False,
            mcp_server=False, run_history=False, theme=look.theme(), css=look.CSS, head=brush.SCRIPT,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(Gate, max_upload=options.max_upload, uploads=uploads)]},
            state_session_capacity=1000,
            _frontend=False,  # or it gives itself 3 seconds to answer, which a busy machine does not keep
        )  # fmt: skip
    except OSError as error:
        raise _not_opened(options.host, options.port, error) from error
    print(f"The page is at {address} (Ctrl-C ends it); pictures go to {folder}", flush=True)
    _until_signal()
    print("Ending: the present job saves what it has.", flush=True)
    studio.jobs.close(GRACE + 60)
    blocks.close(verbose=False)


def _until_signal() -> None:
    ended = threading.Event()

    def end(*_: Any) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while not ended.wait(0.5):
        pass
