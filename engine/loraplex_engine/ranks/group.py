"""The ranks of one model as processes, joined by torch.distributed: gloo between CPUs, NCCL between GPUs.

Orders and notes go through gloo and its store, wherever the tensors are. All of these stay on the loopback interface,
unless the ranks are on several machines.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loraplex_engine.checkpoint.shard import Shard
from loraplex_engine.link.machines import LOOPBACK
from loraplex_engine.link.messages import RankStats

FOREVER = timedelta(days=365)  # for an order, which nobody need give; of a rank that is stuck the heartbeat tells
JOINING = timedelta(seconds=120)  # for the ranks to find each other
LOOKING_SECONDS = 0.005  # between two looks for a note
ORDER_BYTES = 4096  # of an order that goes at once, with its length in front
LENGTH_BYTES = 8

T = TypeVar("T")
Watch = Callable[[], None]  # called while waiting; raises what makes the wait vain


class RanksLostError(RuntimeError):
    """Another rank has ended or failed: what this one computes means nothing any more."""


def _joined(call: Callable[[], T]) -> T:
    try:
        return call()
    except RuntimeError as error:
        raise RanksLostError(f"the ranks of the model have lost each other: {error}") from error


class Notes:
    """Short notes between the ranks, by name. Any thread may call it."""

    def __init__(self, port: int | None, world: int, host: str = LOOPBACK) -> None:
        """`port`: where another rank has opened them on `host`; None: open them there."""
        kind: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch does not say that it exports it
        if port is None:
            # A socket of the store's own would listen on all interfaces. It takes this one over.
            with socket.create_server((host, 0)) as listener:
                self.port: int = listener.getsockname()[1]
                opened = {"is_master": True, "master_listen_fd": listener.detach()}
        else:
            self.port, opened = port, {"is_master": False}
        self.store: Any = _joined(
            lambda: kind(host, self.port, world, timeout=JOINING, wait_for_workers=False, **opened)
        )

    def put(self, name: str, note: bytes) -> None:
        _joined(lambda: self.store.set(name, note))

    def wait(self, name: str, watch: Watch) -> bytes:
        """Wait for a note and read it."""
        while not self.has(name):
            watch()
            time.sleep(LOOKING_SECONDS)
        note: bytes = _joined(lambda: self.store.get(name))
        return note

    def has(self, name: str) -> bool:
        return bool(_joined(lambda: self.store.check([name])))

    def add(self, name: str, number: int) -> int:
        """Add to a number that all ranks know by this name, 0 at first → what it is then."""
        return int(_joined(lambda: self.store.add(name, number)))

    def remove(self, name: str) -> None:
        _joined(lambda: self.store.delete_key(name))


@dataclass
class Traffic:
    """What a rank has exchanged so far."""

    sums: int = 0
    gatherings: int = 0
    passes: int = 0  # to the stage after
    nbytes: int = 0  # of the tensors that it gave
    seconds: float = 0.0  # that these took; on a GPU, that giving the orders took

    @contextmanager
    def counted(self, x: Tensor) -> Iterator[None]:
        """Count an exchange of x."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.nbytes += x.nbytes


class Group:
    """The `Ranks` of a model as processes."""

    def __init__(
        self,
        shard: Shard,
        notes: Notes,
        device: torch.device,
        watch: Watch = lambda: None,
        host: str = LOOPBACK,
    ) -> None:
        """Waits until all ranks are there. `watch`: raises that one has ended. `host`: of this rank, for the others."""
        self.shard = shard
        notes.put(_here(shard.process), b"")
        for process in range(shard.processes):
            notes.wait(_here(process), watch)
        self.traffic = Traffic()
        everyone, stage = (shard.process, shard.processes), (shard.rank, shard.world)
        self._orders = _joined(lambda: _gloo(_part_of(notes.store, "orders"), *everyone, host))
        # NCCL's order of operations is that of its stream: orders cannot be mixed in, and are the host's anyway.
        on_cpu = device.type == "cpu"
        make = partial(_gloo, host=host) if on_cpu else _nccl
        self._stage: Any = _joined(lambda: make(_part_of(notes.store, f"stage/{shard.stage}"), *stage))
        self._ring: Any = self._orders if on_cpu else _joined(lambda: _nccl(_part_of(notes.store, "ring"), *everyone))
        self._patience = (FOREVER,) if on_cpu else ()  # given one, NCCL would hold up the host
        self._passed: tuple[Tensor, Any] | None = None  # kept until the stage after has it

    def add_up(self, x: Tensor) -> Tensor:
        """As `Ranks` has it."""
        self.traffic.sums += 1
        with self.traffic.counted(x):
            _joined(lambda: self._stage.allreduce([x], _patient(dist.AllreduceOptions())).wait())
        return x

    def side_by_side(self, x: Tensor) -> Tensor:
        """As `Ranks` has it."""
        self.traffic.gatherings += 1
        with self.traffic.counted(x):
            parts = _gathered(self._stage, x, self.shard.rank, self.shard.world)
        return torch.cat(parts, dim=1) if parts else x

    def pass_on(self, x: Tensor) -> None:
        """As `Ranks` has it. Waits until the stage after has what was passed on before, but not for x."""
        self.traffic.passes += 1
        with self.traffic.counted(x):
            if self._passed is not None:
                _joined(partial(self._passed[1].wait, *self._patience))
            self._passed = x, _joined(lambda: self._ring.send([x], self.shard.after, 0))

    def take_over(self, x: Tensor) -> Tensor:
        """As `Ranks` has it."""
        started = time.perf_counter()
        _joined(lambda: self._ring.recv([x], self.shard.before, 0).wait(*self._patience))
        self.traffic.seconds += time.perf_counter() - started
        return x

    def figures(self, resident_bytes: int) -> list[RankStats]:
        """On the first rank, once all have called it, what each has exchanged and holds.  resident_bytes: this one"""
        own = self.traffic
        numbers = torch.tensor(
            (own.sums, own.gatherings, own.passes, own.nbytes, round(own.seconds * 1e6), resident_bytes)
        )
        parts = _gathered(self._orders, numbers, self.shard.process, self.shard.processes)
        return [
            RankStats(sums, many, passes, size, micros / 1e6, held)
            for sums, many, passes, size, micros, held in (part.tolist() for part in parts)
        ]

    def share_first(self, x: Tensor) -> None:
        """Give the ranks of the first stage the first one's x, in place. The others need none."""
        if self.shard.is_first:
            _joined(lambda: self._stage.broadcast([x], _from_first(dist.BroadcastOptions())).wait())

    def order(self, order: bytes) -> None:
        """Have every other rank receive an order. Only the first one gives any."""
        first = torch.zeros(ORDER_BYTES, dtype=torch.uint8)
        message = torch.frombuffer(bytearray(len(order).to_bytes(LENGTH_BYTES, "little") + order), dtype=torch.uint8)
        first[: len(message)] = message[:ORDER_BYTES]
        self._broadcast(first)
        if len(message) > ORDER_BYTES:
            self._broadcast(message[ORDER_BYTES:])

    def receive(self) -> bytes:
        """Wait for the next order."""
        first = torch.empty(ORDER_BYTES, dtype=torch.uint8)
        self._broadcast(first)
        start = first.numpy().tobytes()
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        found = start[LENGTH_BYTES : LENGTH_BYTES + length]
        if len(found) == length:
            return found
        rest = torch.empty(length - len(found), dtype=torch.uint8)
        self._broadcast(rest)
        return found + rest.numpy().tobytes()

    def _broadcast(self, x: Tensor) -> None:
        _joined(lambda: self._orders.broadcast([x], _from_first(dist.BroadcastOptions())).wait())


def _here(rank: int) -> str:
    """The name of the note that a rank is there."""
    return f"here/{rank}"


def _gathered(group: Any, x: Tensor, rank: int, world: int) -> list[Tensor]:
    """All ranks' x on the first of a group; on the others nothing."""
    parts = [torch.empty_like(x) for _ in range(world)] if rank == 0 else []
    options = _from_first(dist.GatherOptions())
    _joined(lambda: group.gather([parts] if parts else [], [x], options).wait())
    return parts


def _from_first(options: Any) -> Any:
    options.rootRank = 0
    return _patient(options)


def _patient(options: Any) -> Any:
    options.timeout = FOREVER
    return options


def _gloo(store: Any, rank: int, world: int, host: str) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()  # torch has no public way to name the interface
    options._devices = [kind.create_device(hostname=host)]
    options._timeout = JOINING  # unless a call says otherwise
    options._threads = 1
    return kind(store, rank, world, options)


def _nccl(store: Any, rank: int, world: int) -> Any:
    kind: Any = dist.ProcessGroupNCCL
    return kind(store, rank, world)


def _part_of(store: Any, name: str) -> Any:
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # as above
