"""One page for all tests that need one: it costs more to start than most of them."""

from collections.abc import Iterator

import pytest

from tests.web.running import ROOT, Running, running, tree

WORDS = ["--auth", "ann:secret", "--max_queue", 3, "--max_upload", 1, "--max_train_steps", 50]
PARTS = {"adapters", "inputs", "pictures", "trainings", "uploads"}


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The page of the tiny model, started from elsewhere; it ends in order, and has written in its folder alone."""
    folder = tmp_path_factory.mktemp("page")
    away, home, temporary = (folder / name for name in ("away", "home", "temporary"))
    for place in (away, home, temporary):
        place.mkdir()
    env = {"HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(home / "cache")}
    tiny = ROOT / "models/tiny"
    model = ["--config", tiny / "config.yaml", "--ckpt", tiny / "model.safetensors"]
    with running(folder, *model, *WORDS, cwd=away, env=env) as page:
        yield page
        assert page.process.poll() is None
    assert page.process.returncode == 0, "SIGTERM ends it in order"
    assert {path.name for path in page.outdir.iterdir()} <= PARTS
    assert not any(map(tree, (away, temporary)))
    assert not {path for path in tree(home) if "/cache/" not in path}, "nothing of it lies in the home folder"
