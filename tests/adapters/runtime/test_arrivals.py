"""Adapters that are read while they are uploaded."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraplex_adapters.key import AdapterKey
from loraplex_adapters.runtime.mirror import NO_MIRROR, Mirror, NoMirror
from loraplex_adapters.runtime.store import AdapterStore, FinishedLoad
from loraplex_adapters.runtime.targets import LoraTarget
from loraplex_kernels.ops import LoraWeights

AdapterMaker = Callable[..., Path]
KeyOf = Callable[[Path], AdapterKey]
MakeStore = Callable[..., AdapterStore]
WEIGHTS = "adapter_model.safetensors"


class Loaders(Executor):
    """The threads that read whole adapters, which here is done at once; and how often."""

    def __init__(self) -> None:
        self.num_loads = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.num_loads += 1
        fn(*args, **kwargs)
        return Future()


class Uploading:
    """The weights of an adapter on their way into a directory."""

    def __init__(self, whole: Path, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.content = (whole / WEIGHTS).read_bytes()
        (directory / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
        (directory / WEIGHTS).touch()

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, num_bytes: int) -> int:
        """Write until so many of the bytes are there, and return their number."""
        with (self.directory / WEIGHTS).open("ab") as file:
            file.write(self.content[file.tell() : num_bytes])
        return num_bytes


@pytest.fixture
def loaders() -> Loaders:
    return Loaders()


@pytest.fixture
def make_store(targets: dict[str, LoraTarget], loaders: Loaders) -> Iterator[MakeStore]:
    stores: list[AdapterStore] = []

    def make(budget_bytes: int = 1 << 20, mirror: Mirror = NO_MIRROR) -> AdapterStore:
        stores.append(
            AdapterStore(
                targets,
                torch.float32,
                max_rank=64,
                budget_bytes=budget_bytes,
                num_threads=1,
                pack=lambda weights: weights,
                executor=loaders,
                mirror=mirror,
            )
        )
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def uploading(make_adapter: AdapterMaker, tmp_path: Path) -> Uploading:
    return Uploading(make_adapter("mine"), tmp_path / "incoming")


@pytest.fixture
def key(tmp_path: Path, uploading: Uploading, key_of: KeyOf) -> AdapterKey:
    return key_of(tmp_path / "mine")


def polled(store: AdapterStore) -> FinishedLoad:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for finished in store.poll():
            return finished
        time.sleep(0.001)
    raise TimeoutError


def begin(store: AdapterStore, uploading: Uploading, upload: int = 1) -> None:
    """Have the first bytes of it arrive, and a thread begin with them."""
    store.receive(upload, uploading.directory, uploading.size, uploading.write(10))
    reading = store._arrivals._arrivals[upload].reading
    deadline = time.monotonic() + 20
    while not (reading.running() or reading.done()) and time.monotonic() < deadline:
        time.sleep(0.001)


def go_on(store: AdapterStore, uploading: Uploading, upload: int = 1) -> None:
    """Have the rest of it arrive, in pieces."""
    for part in range(1, 5):
        store.receive(upload, uploading.directory, uploading.size, uploading.write(uploading.size * part // 4))


def test_an_upload_is_read_while_it_comes_and_not_again(
    make_store: MakeStore, loaders: Loaders, uploading: Uploading, key: AdapterKey, tmp_path: Path
) -> None:
    store, reference = make_store(), make_store()
    begin(store, uploading)
    go_on(store, uploading)
    store.register(key, uploading.directory, is_hashed=True, upload=1)
    finished = polled(store)
    assert (finished.key, loaders.num_loads, store.holds(key)) == (key, 0, True)
    assert finished.loaded is not None
    assert finished.loaded.key == key
    reference.register(key, tmp_path / "mine")
    loaded = polled(reference).loaded
    assert loaded is not None
    assert finished.loaded.ranks == loaded.ranks
    for site, packed in loaded.packed.items():
        found = finished.loaded.packed[site]
        assert isinstance(found, LoraWeights)
        assert isinstance(packed, LoraWeights)
        assert torch.equal(found.a, packed.a)


def test_an_adapter_can_be_wanted_before_it_is_read_to_its_end(
    make_store: MakeStore, loaders: Loaders, uploading: Uploading, key: AdapterKey
) -> None:
    store = make_store()
    begin(store, uploading)
    uploading.write(uploading.size)
    store.register(key, uploading.directory, is_hashed=True, upload=1)
    assert polled(store).loaded is not None
    assert loaders.num_loads == 0


def infinite(content: bytes) -> bytes:
    """The weights with another last number."""
    return content[:-4] + np.float32("inf").tobytes()


@pytest.mark.parametrize(
    ("spoilt", "problem"), [(lambda content: b"fake weights", "not a safetensors file"), (infinite, "infinite values")]
)
def test_what_cannot_be_read_while_it_comes_is_read_as_any_other(
    make_store: MakeStore,
    loaders: Loaders,
    uploading: Uploading,
    key: AdapterKey,
    spoilt: Callable[[bytes], bytes],
    problem: str,
) -> None:
    store = make_store()
    uploading.content = spoilt(uploading.content)
    begin(store, uploading)
    go_on(store, uploading)
    store.register(key, uploading.directory, is_hashed=True, upload=1)
    finished = polled(store)
    assert loaders.num_loads == 1
    assert problem in finished.problems[0]
    assert not store.holds(key)


def test_an_upload_that_has_no_thread_is_read_when_it_is_whole(
    make_store: MakeStore, loaders: Loaders, uploading: Uploading, key: AdapterKey
) -> None:
    store = make_store()
    store.receive(1, uploading.directory, uploading.size, uploading.write(100))  # takes the only thread, and goes no on
    store.receive(2, uploading.directory, uploading.size, uploading.size)
    uploading.write(uploading.size)
    store.register(key, uploading.directory, is_hashed=True, upload=2)
    assert polled(store).loaded is not None
    assert loaders.num_loads == 1


def test_an_upload_that_ends_early_makes_room_for_the_next(
    make_store: MakeStore, loaders: Loaders, uploading: Uploading, key: AdapterKey
) -> None:
    store = make_store()
    store.receive(1, uploading.directory, uploading.size, uploading.write(100))
    store.stop_receiving(1)
    store.stop_receiving(1)  # is no error
    begin(store, uploading, upload=2)
    go_on(store, uploading, upload=2)
    store.register(key, uploading.directory, is_hashed=True, upload=2)
    assert polled(store).loaded is not None
    assert loaders.num_loads == 0


def test_loads_hurry_as_long_as_somebody_uploads(
    make_store: MakeStore, uploading: Uploading, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    hurried: list[bool] = []
    monkeypatch.setattr(store.pace, "hurry", hurried.append)
    store.receive(1, uploading.directory, uploading.size, uploading.write(100))
    store.stop_receiving(1)
    assert hurried == [True, False]


class OtherRank(NoMirror):
    """A rank beside this one."""


@pytest.mark.parametrize("case", [{"budget_bytes": 100}, {"mirror": OtherRank()}])
def test_what_does_not_fit_or_has_other_ranks_waits_until_it_is_whole(
    make_store: MakeStore, loaders: Loaders, uploading: Uploading, key: AdapterKey, case: dict[str, Any]
) -> None:
    store = make_store(**case)
    go_on(store, uploading)
    store.register(key, uploading.directory, is_hashed=True, upload=1)
    polled(store)
    assert loaders.num_loads == 1


def test_closing_leaves_no_thread_that_waits(targets: dict[str, LoraTarget], uploading: Uploading) -> None:
    threads = ThreadPoolExecutor(1)
    store = AdapterStore(targets, torch.float32, 64, 1 << 20, 1, pack=lambda weights: weights, executor=threads)
    store.receive(1, uploading.directory, uploading.size, uploading.write(100))
    reading = store._arrivals._arrivals[1].reading
    store.close()
    assert reading.cancelled() or reading.exception(timeout=20) is not None
