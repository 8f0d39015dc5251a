"""How the driver talks to a system under test: one JSON line in, one JSON line out. Standard library only.

A system runs in a process of its own, perhaps in an environment of its own, and stays up for the whole run, so that
repeats of different systems can be interleaved. Its standard output belongs to the protocol; whatever its libraries
print goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workload import Work
from loraplex_service.bench.records import Record

# run(work, concurrency or None for an open loop) -> (records, token ids of each request)
Run = Callable[[Sequence[Work], int | None], Awaitable[tuple[list[Record], list[list[int]]]]]

# The CPU seconds that each part of the system has used so far, such as {"client": 1.5, "service": 2.5}.
Meter = Callable[[], dict[str, float]]


def serve(run: Run, about: dict[str, Any], loop: asyncio.AbstractEventLoop, answers: Any, meter: Meter = dict) -> None:
    """Say that the system is up, then answer runs until standard input ends."""
    _say(answers, about)
    for line in sys.stdin:
        request = json.loads(line)
        work = [Work.from_json(item) for item in request["work"]]
        before = meter()
        try:
            records, tokens = loop.run_until_complete(run(work, request["concurrency"]))
        except Exception as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})
            continue
        cpu_seconds = {part: seconds - before[part] for part, seconds in meter().items()}
        records_json = [vars(record) for record in records]
        _say(answers, {"records": records_json, "tokens": tokens, "cpu_seconds": cpu_seconds})


def take_stdout() -> Any:
    """Keep standard output for answers and send what anybody prints to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def form_of(args: argparse.Namespace) -> str | None:
    """What the base's weights are served as; None: as the checkpoint has them."""
    return args.quantization or (Path(args.base).stem if args.base.endswith(".gguf") else None)


def _say(answers: Any, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)
