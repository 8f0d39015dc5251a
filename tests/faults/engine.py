"""`python -m tests.faults.engine FUSE --bus ADDRESS …`: the true engine, with a fault that happens when it is wanted.

Once there is a file FUSE, the engine takes it away and does what it says; or as long as it says "leak", keeps something
of each request. Production has no such hook: this replaces parts of the engine from outside.
"""

import asyncio
import os
import sys
import threading
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import msgspec

from loraplex_engine import __main__ as entry
from loraplex_engine.link.bus import EngineBus
from loraplex_engine.link.messages import AddRequest, FromEngine, StepOutput, ToEngine
from loraplex_engine.process import Core
from loraplex_service.assembly import LaunchFor
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.supervisor import EngineProcess, Launch

FAULTS = ("raise", "out of memory", "device error", "stuck")
LEAK_BYTES: Final = 16 << 10  # of each request
LOSSES = ("request lost", "output lost", "last output lost")


def engines_with(fuse: Path) -> LaunchFor:
    """For `loraplex_service.app.running`."""

    def launch_for(model: HostedModelConfig) -> Launch:
        command = (sys.executable, "-m", "tests.faults.engine", str(fuse), "--name", model.name, "--bus")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

        async def launch(address: str) -> EngineProcess:
            process = await asyncio.create_subprocess_exec(*command, address, stdin=PIPE, env=environment)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(model.engine()) + b"\n")
            await process.stdin.drain()
            return process

        return launch

    return launch_for


class Fuse:
    def __init__(self, file: Path) -> None:
        self._file = file

    def blow(self, *faults: str) -> str:
        """Which of these faults is wanted now, if any; it will not be wanted again."""
        fault = self._file.read_text() if self._file.exists() else ""
        if fault not in faults:
            return ""
        self._file.unlink()
        return fault

    def glows(self) -> bool:
        """Whether there shall be a leak."""
        return self._file.exists() and self._file.read_text() == "leak"


def sabotage(core: Core, fuse: Fuse) -> None:
    """Have the model's forward pass fail when the fuse is lit, and requests be kept while it glows."""
    import torch  # the entry has set the threads by now

    from loraplex_engine.core import EngineCore
    from loraplex_engine.scheduling.step import PendingResult, StepPlan

    assert isinstance(core, EngineCore)
    add, execute = core.add, core.runner.execute
    kept: list[bytes] = []

    def add_and_keep(message: AddRequest) -> None:
        if fuse.glows():
            kept.append(b"x" * LEAK_BYTES)
        add(message)

    def execute_or_fail(plan: StepPlan) -> PendingResult:
        match fuse.blow(*FAULTS):
            case "raise":
                raise RuntimeError("injected")
            case "out of memory":
                raise torch.OutOfMemoryError("injected")
            case "device error":
                raise torch.AcceleratorError("injected")
            case "stuck":
                threading.Event().wait()
        return execute(plan)

    core.add = add_and_keep  # type: ignore[method-assign]
    core.runner.execute = execute_or_fail  # type: ignore[method-assign]


class LossyBus(EngineBus):
    """Loses one frame when the fuse is lit."""

    fuse: Fuse

    def _send(self, message: ToEngine | FromEngine, flags: int = 0) -> None:
        if isinstance(message, StepOutput):
            has_last = any(output.finish_reason is not None for output in message.outputs)
            if self.fuse.blow("last output lost" if has_last else "output lost"):
                self._num_sent += 1
                return
        super()._send(message, flags)

    def _unpack(self, frame: bytes) -> memoryview:
        payload = super()._unpack(frame)
        if msgspec.msgpack.decode(payload)[0] == AddRequest.__name__ and self.fuse.blow("request lost"):
            self._num_received -= 1  # as if it had never come
            return memoryview(b"")
        return payload


def main() -> None:
    fuse = Fuse(Path(sys.argv.pop(1)))
    load_core = entry.load_core

    def load_and_sabotage(*arguments: Any) -> Core:
        core = load_core(*arguments)
        sabotage(core, fuse)
        return core

    LossyBus.fuse = fuse
    patch.object(entry, "load_core", load_and_sabotage).start()
    patch.object(entry, "EngineBus", LossyBus).start()
    entry.main()


if __name__ == "__main__":
    main()
