import threading

import pytest

from loraplex_adapters.pace import AHEAD, MADE_UP_SECONDS, Pace


class Worker:
    """A thread's CPU time, and the wall clock; the pauses that it was given advance the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
        self.now = 50.0
        self.cpu = 0.0
        self.pauses: list[float] = []
        self.pace = Pace(share, clock=lambda: self.now)
        self.pace.hurry(True)
        monkeypatch.setattr(self.pace._free, "wait", self._wait)

    def load(self, pieces: int, seconds: float) -> None:
        """All of a load, with a rest after each piece."""
        rest = self.pace.begin(lambda: self.cpu)
        for _ in range(pieces):
            self.work(seconds)
            rest()

    def work(self, seconds: float) -> None:
        self.cpu += seconds
        self.now += seconds

    def _wait(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_work_beside_requests_gets_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, share=0.1)
    worker.pace.steps(running=True)
    began = worker.now
    worker.load(10, 0.002)
    assert worker.now - began == pytest.approx(10 * 0.002 / 0.1)


def test_a_load_that_nobody_waits_for_gets_a_part_of_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, share=0.1)
    worker.pace.steps(running=True)
    worker.pace.hurry(False)
    began = worker.now
    worker.load(10, 0.002)
    assert worker.now - began == pytest.approx(10 * 0.002 / (0.1 * AHEAD))


def test_a_load_gets_the_whole_share_once_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, share=0.5)
    worker.pace.steps(running=True)
    worker.pace.hurry(False)
    rest = worker.pace.begin(lambda: worker.cpu)
    for awaited in (False, True):
        worker.pace.hurry(awaited)
        worker.work(0.002)
        rest()
    assert worker.pauses == pytest.approx([0.002 / (0.5 * AHEAD) - 0.002, 0.002])


@pytest.mark.parametrize(("awaited", "made_up"), [(True, MADE_UP_SECONDS), (False, 0.0)])
def test_a_load_that_somebody_waits_for_makes_up_for_time_without_a_core_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, awaited: bool, made_up: float
) -> None:
    worker = Worker(monkeypatch, share=0.1)
    worker.pace.steps(running=True)
    worker.pace.hurry(awaited)
    part = 1.0 if awaited else AHEAD
    rest = worker.pace.begin(lambda: worker.cpu)
    worker.now += 10 * MADE_UP_SECONDS  # others had all cores
    began = worker.now
    for _ in range(10):
        worker.work(0.002)
        rest()
    assert worker.now - began == pytest.approx(10 * 0.002 / (0.1 * part) - made_up)


def test_a_load_that_begins_has_nothing_to_make_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, share=0.1)
    worker.pace.steps(running=True)
    worker.load(1, 0.002)
    worker.now += 1.0
    worker.load(1, 0.002)
    assert worker.pauses == pytest.approx([0.018, 0.018])


def test_two_loads_share_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, share=0.1)
    worker.pace.steps(running=True)
    first, second = (worker.pace.begin(lambda: worker.cpu) for _ in range(2))
    worker.work(0.002)
    worker.pauses.clear()
    monkeypatch.setattr(worker.pace._free, "wait", worker.pauses.append)  # both at the same moment
    first()
    second()
    assert worker.pauses == pytest.approx([0.018, 0.038])


def test_pieces_too_small_to_matter_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(monkeypatch, share=0.5)
    worker.pace.steps(running=True)
    worker.load(4, 0.0001)
    assert worker.pauses == pytest.approx([0.0003])


@pytest.mark.parametrize(("share", "running"), [(0.1, False), (1.0, True)])
def test_without_requests_or_without_a_limit_nobody_pauses(
    monkeypatch: pytest.MonkeyPatch, share: float, running: bool
) -> None:
    worker = Worker(monkeypatch, share)
    worker.pace.steps(running)
    worker.load(1, 5.0)
    assert sum(worker.pauses) == 0.0


def test_a_pause_ends_when_the_last_request_does() -> None:
    pace, cpu = Pace(1e-6), iter((0.0, 1.0, 1.0))
    pace.steps(running=True)
    rest = pace.begin(lambda: next(cpu))
    thread = threading.Thread(target=rest)  # for eleven days
    thread.start()
    pace.steps(running=False)
    thread.join(timeout=30)
    assert not thread.is_alive()
