"""What the page shows of jobs, as HTML. Every word that people wrote is escaped. Imports nothing heavy."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from ldm.web.jobs import Job

WIDTH, HEIGHT = 640, 190  # of the curve, in its own units
LEFT, BOTTOM, TOP = 46, 22, 10


def head(model: str) -> str:
    """The page's title."""
    return f'<div class="studio-head"><b>Latent diffusion studio</b><span>{escape(model)}</span></div>'


def stage(job: Job | None, waiting: Sequence[Job]) -> str:
    """The job that is running: preview, how far it is; how the last one ended; and what waits."""
    if job is None:
        return '<div class="studio-empty"><div>Your pictures appear here</div></div>' + queue(waiting)
    return picture(job) + progress(job) + queue(waiting)


def live(running: Job | None, drawn: Job | None, waiting: Sequence[Job], results: bool) -> str:
    """What stands above the results: all of a job that draws, one line of a training, how a job ended otherwise."""
    if running is not None and (running.kind == "picture" or not results):
        return stage(running, waiting)
    ended = drawn is not None and drawn.state != "done"
    lines = [progress(job) for job in (drawn if ended else None, running) if job is not None]
    return "".join(lines) + queue(waiting) if lines or results else stage(None, waiting)


def training(job: Job | None) -> str:
    """A training: how far it is, and its loss."""
    if job is None:
        return (
            '<div class="studio-empty"><div>Drop three to ten photos of one thing, say what it is, and start.<br>'
            "The loss and sample pictures appear here.</div></div>"
        )
    return progress(job) + curve(job.losses)


def samples(job: Job | None) -> str:
    """A training's sample pictures, the newest first."""
    if job is None or not job.samples:
        return ""
    rows = "".join(
        f'<div><span>step {step}</span><img alt="samples of step {step}" src="{_data(image)}"></div>'
        for step, image in reversed(job.samples)
    )
    return f'<div class="studio-samples">{rows}</div>'


def _data(image: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"


def picture(job: Job) -> str:
    """The preview, large."""
    if not job.preview:
        return ""
    return f'<div class="studio-preview"><img alt="preview" src="{_data(job.preview)}"></div>'


def progress(job: Job) -> str:
    """A bar and a line below it."""
    line = escape(job.line or job.state)
    bar = f'<div class="studio-bar"><div style="width:{100 * job.done:.1f}%"></div></div>' if not job.over else ""
    return (
        f'<div class="studio-job studio-{job.state}"><div class="studio-title">{escape(job.title)}</div>{bar}'
        f'<div class="studio-line">{line}</div></div>'
    )


def queue(waiting: Sequence[Job]) -> str:
    """The jobs that wait, in order."""
    if not waiting:
        return ""
    rows = "".join(f"<li>{escape(job.title)}</li>" for job in waiting)
    return f'<div class="studio-queue"><b>Waiting: {len(waiting)}</b><ol>{rows}</ol></div>'


def curve(losses: Sequence[tuple[int, float]]) -> str:
    """The loss by step, as it is and smoothed, as an SVG."""
    if len(losses) < 2:
        return ""
    first, last = losses[0][0], losses[-1][0]
    low, high = min(v for _, v in losses), max(v for _, v in losses)
    low, high = (low, high) if high > low else (low - 1, high + 1)

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * (step - first) / (last - first)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    smooth, mean = [], losses[0][1]
    for step, value in losses:
        mean += 0.1 * (value - mean)
        smooth.append((step, mean))
    every = max(1, len(losses) // 400)
    raw, line = (" ".join(place(*point) for point in points[::every]) for points in (losses, smooth))
    base = HEIGHT - BOTTOM
    return f"""<svg class="studio-curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by step">
<line x1="{LEFT}" y1="{base}" x2="{WIDTH - 8}" y2="{base}"/><line x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{base}"/>
<polyline class="raw" points="{raw}"/><polyline class="smooth" points="{line}"/>
<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end">{high:.3f}</text>
<text x="{LEFT - 5}" y="{base}" text-anchor="end">{low:.3f}</text>
<text x="{LEFT}" y="{HEIGHT - 6}">step {first}</text>
<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{last}</text>
<text x="{WIDTH - 8}" y="{TOP + 8}" text-anchor="end">loss</text></svg>"""


def pagination(page: int, pages: int, count: int) -> str:
    """Where in the gallery one is."""
    return f'<div class="studio-line">{count} pictures, page {page + 1} of {pages}</div>'


def hint(count: int) -> str:
    """What stands beside the gallery while no picture is chosen."""
    said = f"{count} pictures. Press on one to see how it was made." if count > 1 else "Press on the picture."
    said = said if count else "There are no pictures yet: what the other tabs draw is kept here."
    return f'<div class="studio-empty studio-hint"><div>{said}</div></div>'
