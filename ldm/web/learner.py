"""A training in a process of its own, as the page starts it: python -m ldm.web.learner FOLDER

The folder's settings.json holds the arguments of `ldm.personalize.personalise`. A line a step goes to its
progress.jsonl; when its file `stop` appears, or the page's program is gone, the training ends with the present step;
result.json says what is left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ldm import cli

SETTINGS, PROGRESS, STOP, RESULT = "settings.json", "progress.jsonl", "stop", "result.json"


def main(argv: Sequence[str]) -> None:
    """Train."""
    from ldm.personalize import personalise
    from ldm.util import atomic_path

    page = os.getppid()
    (folder,) = map(Path, argv)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    with open(folder / PROGRESS, "w", encoding="utf-8", buffering=1) as progress:

        def tell(step: int, steps: int, loss: float) -> bool:
            progress.write(json.dumps([step, loss]) + "\n")
            return (folder / STOP).exists() or os.getppid() != page

        result = personalise(**settings, tell=tell)
    left = {"files": [str(path) for path in result.best or result.files], "steps": result.steps,
            "best_step": result.best_step}  # fmt: skip
    with atomic_path(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(left) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
