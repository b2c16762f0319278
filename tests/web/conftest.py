"""One page for all tests that need one: it costs more to start than most of them; and what works behind it."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.running import CKPT, CONFIG, ROOT, Running, running, tree

WORDS = ["--auth", "ann:secret", "--max_queue", 3, "--max_upload", 1, "--max_train_steps", 50]
PARTS = {"adapters", "inputs", "pictures", "trainings", ".uploads"}


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The page of the tiny model, started from elsewhere; it ends in order, and has written in its folder alone."""
    folder = tmp_path_factory.mktemp("page")
    away, home, temporary = (folder / name for name in ("away", "home", "temporary"))
    for place in (away, home, temporary):
        place.mkdir()
    env = {"HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(home / "cache")}
    with running(folder, "--config", ROOT / CONFIG, "--ckpt", ROOT / CKPT, *WORDS, cwd=away, env=env) as page:
        yield page
        assert page.process.poll() is None
    assert page.process.returncode == 0, "SIGTERM ends it in order"
    assert {path.name for path in page.outdir.iterdir()} <= PARTS
    assert not any(map(tree, (away, temporary)))
    assert not {path for path in tree(home) if "/cache/" not in path}, "nothing of it lies in the home folder"


@pytest.fixture(scope="session")
def model() -> Any:
    from ldm.inference import load_model  # heavy, and not needed by tests that have the page

    return load_model(CONFIG, CKPT, "cpu")


@pytest.fixture
def studio(model: Any, tmp_path: Path) -> Iterator[Any]:
    from ldm.web.studio import Studio

    options = argparse.Namespace(
        config=CONFIG, ckpt=CKPT, vae=None, allow_pickle=False, outdir=str(tmp_path / "out"),
        adapters=[str(tmp_path / "shelf")], max_size=None, max_steps=50, max_pictures=4, max_queue=3, max_train_steps=9,
        max_upload=1, max_folder=1.0, precision="full", vae_tiling=False, attention_slicing=False, train_base=None,
    )  # fmt: skip
    (tmp_path / "shelf").mkdir()
    studio = Studio(options, model, None)
    yield studio
    studio.jobs.close()
    studio.wear({})
