"""Where drafts come into a plan: guesses at the tokens to come, which a step checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.step import ScheduledRequest, StepPlan, StepResult


class Drafter(Protocol):
    """Adds drafts to what was scheduled. The scheduler and the runner need not know where they come from."""

    def add(self, scheduled: Sequence[ScheduledRequest], budget: int) -> list[ScheduledRequest]:
        """The same requests in the same order, with drafts of at most `budget` tokens, for which they hold blocks."""

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """Note what came of a plan, before its requests get their tokens."""

    def forget(self, request: Request) -> None:
        """Note that a request has ended."""


class NoDrafts(Drafter):
    """Adds none."""

    def add(self, scheduled: Sequence[ScheduledRequest], budget: int) -> list[ScheduledRequest]:
        return list(scheduled)

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        return

    def forget(self, request: Request) -> None:
        return
