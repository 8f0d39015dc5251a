"""How long a step of so many rows takes: measured once the model is loaded, and then with every step that decodes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from statistics import median

from loraplex_engine.execution.cuda_graph import batch_sizes
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan

KEPT = 9  # of the latest times of each number of rows: their median counts, so that what else a machine does does not
REPEATS = 3
CONTEXT = 64  # tokens
LONGEST_SECONDS = 2.0  # for measuring steps with more rows than one request may have


class StepCosts:
    """The seconds that steps take, by their rows."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        """`seconds`: what was measured at first, by rows; of one row at least."""
        self._measured = dict(seconds)
        self._times: dict[int, deque[float]] = {}  # of the latest steps
        self._medians = dict(seconds)
        self._known = sorted(seconds)

    def note(self, rows: int, seconds: float) -> None:
        """Take in the time of a step.

        A machine is faster or slower in use than it was when it was measured: numbers of rows that have not come yet
        are taken to have changed as this one has. Else what is never tried would stay as dear as it was once.
        """
        times = self._times.setdefault(rows, deque(maxlen=KEPT))
        times.append(seconds)
        self._medians[rows] = median(times)
        if rows in self._measured:
            drift = self._medians[rows] / self._measured[rows]
            self._medians |= {other: drift * at for other, at in self._measured.items() if other not in self._times}
        if len(self._known) < len(self._medians):
            self._known = sorted(self._medians)

    def seconds(self, rows: int) -> float:
        """The time of a step: measured, or between those of the nearest numbers of rows that were."""
        if rows in self._medians:
            return self._medians[rows]
        place = bisect_left(self._known, rows)
        if place == 0:
            return self._medians[self._known[0]]
        if len(self._known) == 1:  # other steps take as much for each row
            return self._medians[self._known[0]] * rows / self._known[0]
        low, high = self._known[place - 1 : place + 1] if place < len(self._known) else self._known[-2:]
        before, after = self._medians[low], self._medians[high]
        if place == len(self._known):  # more rows never take less
            return after + max(after - before, 0.0) * (rows - high) / (high - low)
        return before + (after - before) * (rows - low) / (high - low)

    def prices(self, num_requests: int, rows: int, most: int) -> list[float]:
        """What 1, 2, … `most` rows more cost, in a step that has `rows`: in tokens, of which it has `num_requests`
        without drafts."""
        token, before = self.seconds(num_requests) / num_requests, self.seconds(rows)
        return [max(self.seconds(rows + more) - before, 0.0) / token for more in range(1, most + 1)]


def measured(runner: ModelRunner, num_drafts: int, most_rows: int) -> StepCosts:
    """The times of steps of one request with drafts, up to `most_rows`; at least up to `num_drafts` of these.

    They are the least of several: whatever disturbs a step makes it longer.
    """
    seconds: dict[int, float] = {}
    began = time.perf_counter()
    for rows in batch_sizes(min(most_rows, runner.max_model_len - 1)):
        if rows > num_drafts and len(seconds) > 1 and time.perf_counter() - began > LONGEST_SECONDS:
            break
        plan = _probe(rows, runner)
        seconds[rows] = min(_seconds(runner, plan) for _ in range(REPEATS))
    return StepCosts(seconds)


def _probe(rows: int, runner: ModelRunner) -> StepPlan:
    """A step of so many rows. What it stores in the cache, nothing reads."""
    context = min(CONTEXT, runner.max_model_len - rows)
    request = Request(AddRequest(0, [0] * context, SamplingParams(seed=0, max_tokens=rows + 1)), 0, now=0.0)
    request.block_ids = [0] * -(-(context + rows) // runner.block_size)
    return StepPlan((ScheduledRequest(request, context - 1, 1, (0,) * (rows - 1)),))


def _seconds(runner: ModelRunner, plan: StepPlan) -> float:
    began = time.perf_counter()
    runner.execute(plan).result()
    return time.perf_counter() - began
