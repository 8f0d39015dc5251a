"""One GPU that is not there: torch's own functions check what they are given, and below them stands what follows.

Tensors lie on the CPU, and Triton's kernels run under its interpreter. What torch checks in Python is checked by torch
itself; what CUDA and torch's C++ check (the index of a device, what can be page-locked, what a capture forbids) is
checked here. A graph that was captured is replayed: the same operations on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

TOTAL_BYTES = 8 << 30
MULTIPROCESSORS = 8


class StandIn:
    """What is asked of the device, and what it was told."""

    def __init__(self, num_devices: int = 1) -> None:
        self.num_devices = num_devices
        self.current = 0
        self.selected: list[int] = []  # by set_device
        self.reserved_bytes = 1 << 30  # by torch's allocator
        self.others_bytes = 0  # by other processes
        self.bytes_per_graph = 0
        self.num_graphs = 0  # that exist
        self.num_replays = 0
        self.num_waits = 0  # of the host for the device, while `Waits` watches
        self.num_copies = 0  # between the two, likewise
        self.capture: Capture | None = None
        self.stream = 0
        self.ids = count(1)
        self.pools: set[tuple[int, int]] = set()

    def check(self, index: int) -> int:
        if not 0 <= index < self.num_devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index

    def wait(self) -> None:
        if self.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def select(self, index: int) -> None:
        self.current = self.check(index)
        self.selected.append(index)

    def exchange(self, index: int) -> int:
        before = self.current
        if index >= 0:
            self.current = self.check(index)
        return before

    def memory(self, index: int) -> tuple[int, int]:
        self.check(index)
        taken = self.reserved_bytes + self.others_bytes + self.num_graphs * self.bytes_per_graph
        return TOTAL_BYTES - taken, TOTAL_BYTES

    def set_stream(self, stream_id: int, device_index: int, device_type: int) -> None:
        self.check(device_index)
        self.stream = stream_id

    def new_pool(self) -> tuple[int, int]:
        self.pools.add(pool := (0, next(self.ids)))
        return pool


class Capture(TorchDispatchMode):
    """Records every operation, torch's and Triton's, with the memory that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        result = func(*args, **kwargs)
        self.operations.append(lambda: _again(func, args, kwargs, result))
        return result


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    if isinstance(result, Tensor) and "empty" not in str(func):
        result.copy_(func(*args, **kwargs))
    elif not isinstance(result, Tensor):
        func(*args, **kwargs)


class OnTheCpu(TorchFunctionMode):
    """Tensors that are to lie on the device lie on the CPU. `to` copies, as it does between devices."""

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        moved = any(self._on_device(value) for value in (*args, *kwargs.values()))
        args = [torch.device("cpu") if self._on_device(value) else value for value in args]
        kwargs = {key: torch.device("cpu") if self._on_device(value) else value for key, value in kwargs.items()}
        if kwargs.pop("pin_memory", False) and moved:
            raise RuntimeError("Only dense CPU tensors can be pinned")
        if moved and func is Tensor.to:
            self._device.wait()
            kwargs["copy"] = True
            return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _on_device(self, value: object) -> bool:
        if isinstance(value, str) and value.startswith("cuda"):
            value = torch.device(value)
        if not isinstance(value, torch.device) or value.type != "cuda":
            return False
        self._device.check(value.index or 0)
        return True


@contextmanager
def one_cuda_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """While it lasts, torch sees one CUDA device."""
    stand_in = StandIn()
    below = {
        "_cuda_setDevice": stand_in.select,
        "_cuda_getDevice": lambda: stand_in.current,
        "_cuda_synchronize": stand_in.wait,
        "_cuda_emptyCache": stand_in.wait,
        "_cuda_memoryStats": lambda index: {"reserved_bytes": {"all": {"current": stand_in.reserved_bytes}}},
        "_cuda_getCurrentStream": lambda index: (stand_in.stream, stand_in.check(index), 1),
        "_cuda_setStream": stand_in.set_stream,
        "_host_emptyCache": stand_in.wait,
    }
    for name, function in below.items():
        monkeypatch.setattr(torch._C, name, function, raising=False)
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda.memory, "is_initialized", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: stand_in.num_devices)
    monkeypatch.setattr(cuda, "_exchange_device", stand_in.exchange)
    monkeypatch.setattr(cuda, "_maybe_exchange_device", stand_in.exchange)
    monkeypatch.setattr(torch._utils, "_get_current_device_index", lambda: stand_in.current)
    properties = SimpleNamespace(
        name="stand-in", multi_processor_count=MULTIPROCESSORS, total_memory=TOTAL_BYTES, major=9, minor=0, uuid="GPU-0"
    )
    monkeypatch.setattr(cuda, "_get_device_properties", lambda index: properties, raising=False)
    monkeypatch.setattr(cuda, "cudart", lambda: SimpleNamespace(cudaMemGetInfo=stand_in.memory))
    monkeypatch.setattr(cuda.graphs, "_graph_pool_handle", stand_in.new_pool)
    monkeypatch.setattr(cuda, "Stream", _stream_class(stand_in))
    monkeypatch.setattr(cuda, "Event", _event_class(stand_in))
    monkeypatch.setattr(cuda, "CUDAGraph", _graph_class(stand_in))
    monkeypatch.setattr(cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(Tensor, "pin_memory", _pin_memory)
    _record_launches(stand_in, monkeypatch)
    with OnTheCpu(stand_in):
        yield stand_in


def _pin_memory(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    return tensor.clone()


def _record_launches(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is one operation of a capture, whatever the interpreter does with tensors to run it."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            launch(executor, *args, **kwargs)
        if stand_in.capture is not None:
            stand_in.capture.operations.append(lambda: launch(executor, *args, **kwargs))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


def _stream_class(stand_in: StandIn) -> type:
    class Stream:
        def __init__(self, device: Any = None, priority: int = 0, **ids: int) -> None:
            with torch.cuda.device(device):  # as torch does, which checks it
                self.device_index = ids.get("device_index", stand_in.current)
            self.device = torch.device("cuda", self.device_index)
            self.device_type = 1
            self.stream_id = ids.get("stream_id", next(stand_in.ids))

        def wait_stream(self, other: Stream) -> None:
            assert isinstance(other, Stream)

    return Stream


def _event_class(stand_in: StandIn) -> type:
    class Event:
        def record(self, stream: Any = None) -> None:
            assert stream is None or stream.device_index == stand_in.current

        def synchronize(self) -> None:
            stand_in.wait()
            stand_in.num_waits += 1

    return Event


READS = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.nonzero, torch.nonzero, torch.equal}
READS |= {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
COPIES = {Tensor.to, Tensor.copy_}
INDEXES = {Tensor.__getitem__, Tensor.__setitem__}


class Waits(TorchFunctionMode):
    """Counts how often the host waits: for what it reads, for copies that it does not only begin, and for how many
    places of a mask are set.

    A tensor lies on the device if it was made there, moved there, or computed from one that does.
    """

    def __init__(self, device: StandIn) -> None:
        super().__init__()
        self._device = device
        self._on_device = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        moved = any(isinstance(value, torch.device) and value.type == "cuda" for value in given)
        here = [self._is_on_device(value) for value in _tensors(given)]
        if func in READS:
            self._device.num_waits += any(here)
        elif func in COPIES or func is torch.tensor:
            between = moved or (func is Tensor.copy_ and here[0] != here[1])
            self._device.num_copies += between
            self._device.num_waits += between and not kwargs.get("non_blocking", False)
        elif func in INDEXES and here[0]:
            self._device.num_waits += self._waits_for_index(args[1])
        if moved or (any(here) and func not in READS and not (func is Tensor.copy_ and not here[0])):
            for tensor in _tensors([result]):
                self._on_device[tensor] = True
        return result

    def _is_on_device(self, tensor: Tensor) -> bool:
        return tensor in self._on_device

    def _waits_for_index(self, index: Any) -> bool:
        """Lists and tensors of the host are copied first; of a mask, the number of places is."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, list | np.ndarray) for part in parts):
            return True
        return any(part.dtype == torch.bool or not self._is_on_device(part) for part in _tensors(parts))


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def _graph_class(stand_in: StandIn) -> type:
    class Graph:
        def __init__(self, keep_graph: bool = False) -> None:
            self._capture: Capture | None = None
            stand_in.num_graphs += 1

        def __del__(self) -> None:
            stand_in.num_graphs -= 1

        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **options: Any) -> None:
            if stand_in.stream == 0:
                raise RuntimeError("CUDA graphs must be captured on a non-default stream")
            if capture_error_mode not in ("global", "thread_local", "relaxed"):
                raise RuntimeError(f"Unknown capture error mode {capture_error_mode}")
            assert pool is None or tuple(pool) in stand_in.pools
            stand_in.wait()
            self._capture = stand_in.capture = Capture()
            self._capture.__enter__()

        def capture_end(self) -> None:
            assert self._capture is not None
            self._capture.__exit__(None, None, None)
            stand_in.capture = None

        def replay(self) -> None:
            if self._capture is None:
                raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
            stand_in.num_replays += 1
            with torch.inference_mode():
                for operation in self._capture.operations:
                    operation()

    return Graph
