"""The page's queue: one job after the other, stopped when somebody says so, and none that ends the worker."""

import threading
from collections.abc import Callable

import pytest

from ldm.errors import UserError
from ldm.web import view
from ldm.web.jobs import Job, Jobs, JobStopped

SECONDS = 20


def finished(jobs: Jobs, run: Callable[[Job], None], title: str = "a job") -> Job:
    """The job after it has ended."""
    over = threading.Event()
    jobs.submit(job := Job(title, run))
    jobs.submit(Job("after it", lambda _: over.set()))
    assert over.wait(SECONDS), "the worker lives and goes on with the next job"
    return job


def test_jobs_run_one_at_a_time_in_the_order_in_which_they_came() -> None:
    jobs, order, inside = Jobs(10), [], threading.Lock()

    def note(number: int) -> Callable[[Job], None]:
        def run(job: Job) -> None:
            assert inside.acquire(blocking=False), "no two run at once"
            order.append(number)
            inside.release()

        return run

    last = [jobs.submit(Job("", note(number))) for number in range(5)][-1]
    assert last <= 4
    assert finished(jobs, note(5)).state == "done"
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_full_queue_says_so_and_can_be_emptied() -> None:
    jobs, go, running = Jobs(2), threading.Event(), threading.Event()
    ran = []

    def hold(job: Job) -> None:
        running.set()
        go.wait(SECONDS)

    jobs.submit(Job("holds", hold))
    assert running.wait(SECONDS)
    for _ in range(2):
        jobs.submit(Job("waits", lambda _: ran.append(1)))
    with pytest.raises(UserError, match="2 jobs are waiting already"):
        jobs.submit(Job("one too many", lambda _: ran.append(1)))
    jobs.clear()
    go.set()
    finished(jobs, lambda job: None)
    assert not ran, "what was taken out of the queue does not run"


@pytest.mark.parametrize("after_picture", [False, True])
def test_stop_now_and_stop_after_the_picture(after_picture: bool) -> None:
    jobs, steps = Jobs(5), []

    def draw(job: Job) -> None:
        for picture in range(2):
            for step in range(3):
                job.heed()
                steps.append((picture, step))
                if (picture, step) == (0, 1):
                    jobs.stop(after_picture)
            job.heed(picture_done=True)

    job = finished(jobs, draw)
    assert job.state == "stopped"
    assert steps == [(0, step) for step in range(3 if after_picture else 2)]


def test_what_goes_wrong_is_one_line_and_the_worker_lives_on(capfd: pytest.CaptureFixture[str]) -> None:
    def mistaken(job: Job) -> None:
        raise UserError("adapter 'x': it is damaged")

    def broken(job: Job) -> None:
        raise ZeroDivisionError("secret of the machine")

    jobs = Jobs(5)
    assert finished(jobs, mistaken).line == "adapter 'x': it is damaged"
    job = finished(jobs, broken)
    assert job.state == "failed" and "secret" not in job.line and "Traceback" not in job.line
    assert "secret of the machine" in capfd.readouterr().err, "the program's own output has the whole of it"


def test_what_is_left_of_a_job_is_said_at_its_end() -> None:
    def stopped(job: Job) -> None:
        raise JobStopped("stopped; step 3 is kept")

    jobs = Jobs(5)
    assert finished(jobs, lambda job: "step 9 is kept").line.endswith(" s; step 9 is kept")
    assert finished(jobs, lambda job: None).line.endswith(" s")
    job = finished(jobs, stopped)
    assert job.state == "stopped" and job.line == "stopped; step 3 is kept"


def test_closing_stops_the_present_job_and_waits_for_it() -> None:
    jobs, running, put_in_order = Jobs(5), threading.Event(), []

    def train(job: Job) -> None:
        running.set()
        try:
            while True:
                job.heed()
        finally:
            put_in_order.append(True)

    jobs.submit(Job("trains", train))
    assert running.wait(SECONDS)
    jobs.close(SECONDS)
    assert put_in_order


def test_what_people_wrote_is_shown_as_text() -> None:
    job = Job("<script>alert(1)</script>", lambda _: None, line="<img src=x onerror=y>", losses=[(1, 2.0), (2, 1.0)],
              samples=[(1, b"first"), (60, b"newest")])  # fmt: skip
    for html in (view.stage(job, [job]), view.training(job)):
        assert "<script" not in html and "onerror=y>" not in html.replace("onerror=y&gt;", "")
        assert "&lt;script&gt;" in html
    assert view.curve(job.losses).count("<polyline") == 2
    rows = view.samples(job)
    assert rows.count("<img") == 2 and rows.index("step 60") < rows.index("step 1<"), "the newest first"
