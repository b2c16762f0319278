"""The pictures that were made, each with a JSON beside it that says how, so that it can be made again."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from ldm.outputs import Picture

KINDS = {"text": "Text to image", "image": "Image to image", "inpaint": "Inpainting"}


@dataclass(frozen=True)
class Request:
    """Pictures that somebody asked for; every value is checked.

    Args:
        kind: a key of `KINDS`. seed: of the first picture; picture i has seed + i. eta: None for the sampler's own.
        height, width: pixels, of text to image. side: the longer side of image to image and inpainting.
        adapters: names and weights. image, mask: names in `Gallery.inputs`.
    """

    kind: str
    prompt: str
    negative_prompt: str = ""
    sampler: str = "ddim"
    schedule: str | None = None
    steps: int = 50
    scale: float = 7.5
    eta: float | None = None
    seed: int = 42
    count: int = 1
    height: int | None = None
    width: int | None = None
    side: int | None = None
    strength: float | None = None
    prompt_weighting: bool = False
    clip_skip: int | None = None
    adapters: Mapping[str, float] = field(default_factory=dict)
    image: str | None = None
    mask: str | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Request:
        """From a picture's JSON.

        Raises:
            UserError: it is of another program.
        """
        known = {f.name for f in fields(cls)}
        if record.get("kind") not in KINDS or not isinstance(record.get("prompt"), str):
            raise UserError("this picture's settings cannot be read")
        return cls(**{key: value for key, value in record.items() if key in known})


@dataclass(frozen=True)
class Gallery:
    """`pictures/00000.png` and `.json` ... in a folder, and in `inputs` what images they were made from."""

    folder: Path

    def __post_init__(self) -> None:
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.inputs.mkdir(parents=True, exist_ok=True)

    @property
    def pictures(self) -> Path:
        """The folder of the pictures."""
        return self.folder / "pictures"

    @property
    def inputs(self) -> Path:
        """The folder of the images that they were made from, named after what is in them."""
        return self.folder / "inputs"

    def names(self) -> list[str]:
        """All pictures, the newest first."""
        found = (path.name for path in self.pictures.iterdir())
        return sorted((n for n in found if re.fullmatch(r"\d{5,}\.png", n)), key=lambda n: (len(n), n), reverse=True)

    def still_there(self, names: Sequence[str]) -> list[str]:
        """Those of the names whose picture nobody has taken away."""
        return [name for name in names if (self.pictures / name).is_file()]

    def path(self, name: Any) -> Path:
        """Where a picture is.

        Raises:
            UserError: there is none of that name.
        """
        if not isinstance(name, str) or not re.fullmatch(r"\d{5,}\.png", name) or not (self.pictures / name).is_file():
            raise UserError("there is no such picture (any more)")
        return self.pictures / name

    def add(self, picture: Picture, request: Request) -> str:
        """Write a picture and what it was made with; returns its name."""
        from ldm.util import atomic_path

        newest = self.names()[:1]
        name = f"{int(newest[0].removesuffix('.png')) + 1 if newest else 0:05}.png"
        record = asdict(request) | {"parameters": picture.settings.parameters(), "blocked": picture.blocked}
        with atomic_path((self.pictures / name).with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        picture.save(self.pictures / name)
        return name

    def record(self, name: Any) -> dict[str, Any]:
        """A picture's JSON.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        try:
            record = json.loads(self.path(name).with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"the settings of {name} are not here any more") from error
        if not isinstance(record, dict):
            raise UserError(f"the settings of {name} cannot be read")
        return record

    def parameters(self, name: str) -> str:
        """How a picture was made, in words; none when its JSON is not here any more."""
        try:
            return str(self.record(name).get("parameters", ""))
        except UserError:
            return ""

    def keep_input(self, image: Image.Image) -> str:
        """Write an image that pictures are made from, once; returns its name."""
        from ldm.util import atomic_path

        written = io.BytesIO()
        image.save(written, "PNG")
        name = f"{hashlib.sha256(written.getvalue()).hexdigest()[:20]}.png"
        if not (self.inputs / name).exists():
            with atomic_path(self.inputs / name) as temporary:
                temporary.write_bytes(written.getvalue())
        return name

    def input(self, name: Any) -> Path:
        """Where such an image is.

        Raises:
            UserError: there is none of that name.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[0-9a-f]{20}\.png", name):
            raise UserError("there is no such image")
        if not (self.inputs / name).is_file():
            raise UserError("the image that this picture was made from is not here any more")
        return self.inputs / name
