"""The brush with which masks are painted over an image in the browser, and what comes of it.

A canvas lies over the image of the element `#inpaint-image`. When pictures are asked for, `MASK` (the `js` of a Gradio
event) puts what was painted, as a PNG, into the last of the values that are sent.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from PIL import Image

from ldm.errors import UserError

PAINTED = 40  # opacity from which on a pixel counts
LONGEST = 1024  # pixels of the canvas' longer side
START = "data:image/png;base64,"
MASK = "(...values) => [...values.slice(0, -1), window.studioMask ? window.studioMask() : '']"

TOOLS = """<div class="studio-tools"><label>Brush
<input type="range" id="brush-size" min="2" max="40" value="12"></label>
<button type="button" id="brush-clear">Clear</button><span>Paint over what is to be redrawn.</span></div>"""

SCRIPT = """<script>
(() => {
  const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
  canvas.id = 'brush';
  let painted = false, last = null, source = '', token = '';

  const place = () => {  // over the part of the element that the image fills
    const image = document.querySelector('#inpaint-image img');
    if (!image || !image.naturalWidth || !image.offsetParent) { if (!image) source = ''; return; }
    const frame = image.parentElement, outer = frame.getBoundingClientRect(), box = image.getBoundingClientRect();
    const scale = Math.min(box.width / image.naturalWidth, box.height / image.naturalHeight);
    const width = image.naturalWidth * scale, height = image.naturalHeight * scale;
    if (canvas.parentElement !== frame) { frame.style.position = 'relative'; frame.appendChild(canvas); }
    Object.assign(canvas.style, {
      left: box.left - outer.left + (box.width - width) / 2 + 'px', width: width + 'px',
      top: box.top - outer.top + (box.height - height) / 2 + 'px', height: height + 'px',
    });
    if (image.src !== source) {
      source = image.src;
      const shrink = Math.max(1, Math.max(image.naturalWidth, image.naturalHeight) / LONGEST);
      canvas.width = Math.round(image.naturalWidth / shrink);
      canvas.height = Math.round(image.naturalHeight / shrink);
      clear();
    }
    const again = document.querySelector('#inpaint-again img');  // the mask of a picture that is used again
    if (again && again.dataset.token !== token && again.complete) {
      token = again.dataset.token;
      clear();
      pen.drawImage(again, 0, 0, canvas.width, canvas.height);
      painted = true;
    }
  };
  const clear = () => { pen.clearRect(0, 0, canvas.width, canvas.height); painted = false; };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return [x * canvas.width, y * canvas.height];
  };
  const stroke = (event) => {
    const [x, y] = point(event), size = Number((document.getElementById('brush-size') || {value: 12}).value) / 100;
    pen.lineWidth = size * Math.max(canvas.width, canvas.height);
    pen.lineCap = pen.lineJoin = 'round';
    pen.strokeStyle = 'BRUSH';
    pen.beginPath();
    pen.moveTo(...(last || [x, y]));
    pen.lineTo(x + 0.01, y);
    pen.stroke();
    last = [x, y];
    painted = true;
  };
  const stop = (event) => { event.preventDefault(); event.stopPropagation(); };
  canvas.addEventListener('pointerdown', (event) => {
    stop(event);
    canvas.setPointerCapture(event.pointerId);
    stroke(event);
  });
  canvas.addEventListener('pointermove', (event) => { if (last) { stop(event); stroke(event); } });
  for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, () => { last = null; });
  for (const name of ['click', 'touchstart', 'dragstart']) canvas.addEventListener(name, stop);
  document.addEventListener('click', (event) => { if (event.target.id === 'brush-clear') clear(); });
  window.studioMask = () => painted && source ? canvas.toDataURL('image/png') : '';
  setInterval(place, 250);
})();
</script>""".replace("LONGEST", str(LONGEST)).replace("BRUSH", "#ff2d87")


def mask_of(painted: Any, size: tuple[int, int]) -> Image.Image:
    """The mask [size], white where something was painted, from what `MASK` sent.

    Raises:
        UserError: nothing was painted, or this is no PNG of the canvas.
    """
    if not painted:
        raise UserError("Mask: paint over the part of the image that is to be redrawn")
    try:
        content = base64.b64decode(painted.removeprefix(START), validate=True)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if max(image.size) > LONGEST:
                raise UserError(f"Mask: it may have {LONGEST} pixels a side")
            alpha = image.convert("RGBA").getchannel("A")
    except (AttributeError, TypeError, binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise UserError("Mask: it cannot be read; paint it anew") from error
    mask = alpha.point(lambda a: 255 if a >= PAINTED else 0).resize(size, Image.Resampling.NEAREST)
    if not mask.getbbox():
        raise UserError("Mask: paint over the part of the image that is to be redrawn")
    return mask


def shown_again(mask: Any) -> str:
    """HTML from which the brush takes up a mask, a file of `Gallery.inputs`."""
    with Image.open(mask) as image:
        painted = Image.new("RGBA", image.size, "#ff2d87")
        painted.putalpha(image.convert("L"))
    written = io.BytesIO()
    painted.save(written, "PNG")
    token = f"{mask}-{id(written)}"
    return f'<img alt="" data-token="{token}" src="{START}{base64.b64encode(written.getvalue()).decode()}">'
