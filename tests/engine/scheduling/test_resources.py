"""A new kind of resource needs a preparer and nothing else: grammars, compiled in a thread, as a rehearsal."""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from loraplex_engine.link.sampling_params import FinishReason
from loraplex_engine.scheduling.adapters import AdapterPreparer
from loraplex_engine.scheduling.request import Request, RequestState
from loraplex_engine.scheduling.resources import NeverReadyError, Preparer
from loraplex_engine.scheduling.scheduler import Scheduler
from tests.engine.scheduling.test_scheduler import KEY, Bench


class FakeGrammars(Preparer):
    """Compiles grammars in a thread, once the test lets it."""

    def __init__(self) -> None:
        self.may_compile = Event()
        self.wanted = {1: "[0-9]+", 2: "[0-9]+", 3: "[0-9"}  # by request id
        self.holders: Counter[str] = Counter()
        self.compiled: dict[str, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1)

    @property
    def changes(self) -> int:
        return sum(future.done() for future in self.compiled.values())

    def key(self, request: Request) -> str | None:
        return self.wanted.get(request.request_id)

    def give(self, request: Request) -> bool:
        grammar = self.wanted[request.request_id]
        if grammar not in self.compiled:
            self.compiled[grammar] = self._thread.submit(self._compile, grammar)
        future = self.compiled[grammar]
        if not future.done():
            return False
        if error := future.exception():
            raise NeverReadyError(str(error))
        self.holders[grammar] += 1
        return True

    def take_back(self, request: Request) -> None:
        self.holders[self.wanted[request.request_id]] -= 1

    def finish(self) -> None:
        self.may_compile.set()
        self._thread.shutdown()

    def _compile(self, grammar: str) -> None:
        self.may_compile.wait()
        re.compile(grammar)


@pytest.fixture
def grammars() -> Iterator[FakeGrammars]:
    grammars = FakeGrammars()
    yield grammars
    grammars.finish()


@pytest.fixture
def bench(grammars: FakeGrammars) -> Bench:
    bench = Bench()
    bench.scheduler = Scheduler(bench.blocks, [grammars, AdapterPreparer(bench.slots)], 8, 16, 256, bench.clock)
    return bench


def test_a_request_waits_for_its_grammar_and_others_run(bench, grammars):
    waiting = [bench.add(request_id, [5]) for request_id in (1, 2)]
    bench.add(4, [6])
    assert [item.request.request_id for item in bench.step().scheduled] == [4]
    assert {request.state for request in waiting} == {RequestState.WAITING_FOR_RESOURCE}
    grammars.finish()
    bench.finish()
    assert {bench.reason(request_id) for request_id in (1, 2, 4)} == {FinishReason.MAX_TOKENS}
    assert +grammars.holders == Counter()


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(bench, grammars):
    for request_id in (1, 3):
        bench.add(request_id, [5])
    bench.step()
    grammars.finish()
    bench.finish()
    assert bench.outputs[3][-1].error == "unterminated character set at position 0"
    assert bench.reason(1) is FinishReason.MAX_TOKENS


def test_a_request_that_is_aborted_while_it_waits_holds_nothing(bench, grammars):
    bench.slots.arrive(KEY)
    bench.add(1, [5], adapter=KEY)
    bench.step()
    bench.scheduler.abort(1)
    grammars.finish()
    bench.finish()
    assert bench.outputs == {}
    assert +grammars.holders == +bench.slots.references == Counter()


def test_what_waits_for_two_things_waits_for_one_after_the_other(bench, grammars):
    request = bench.add(1, [5], adapter=KEY)
    bench.step()
    grammars.finish()
    bench.step()
    assert (request.num_given, request.state) == (1, RequestState.WAITING_FOR_RESOURCE)
    bench.slots.arrive(KEY)
    bench.finish()
    assert bench.reason(1) is FinishReason.MAX_TOKENS
    assert list(request.waits) == ["[0-9]+", KEY]


def test_a_kind_of_resource_is_small():
    assert len(Path(__file__).read_text().splitlines()) <= 120
