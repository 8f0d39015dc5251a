"""Loraplex's EngineCore in this process: the engine without messages, tokenizer or gRPC."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.worker import form_of, serve, take_stdout
from benchmarks.workload import Work
from loraplex_adapters.files.source import digest
from loraplex_adapters.key import AdapterKey
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import QUANTIZATIONS, EngineConfig
from loraplex_engine.link.messages import AddRequest, FromEngine, StepOutput, WantAdapter
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.bench.loops import drive
from loraplex_service.bench.records import Record


class Driver:
    """Steps the core as long as somebody waits for tokens."""

    def __init__(self, core: EngineCore, keys: Sequence[AdapterKey]) -> None:
        self.core = core
        self.keys = keys
        self._next_id = 0
        self._on_tokens: dict[int, Callable[[list[int], bool], None]] = {}

    async def generate(self, work: Work, on_tokens: Callable[[int], None]) -> list[int]:
        self._next_id += 1
        request_id = self._next_id
        tokens: list[int] = []
        done = asyncio.get_running_loop().create_future()

        def take(new: list[int], finished: bool) -> None:
            tokens.extend(new)
            on_tokens(len(new))
            if finished:
                done.set_result(None)

        self._on_tokens[request_id] = take
        adapter = None if work.adapter is None else self.keys[work.adapter]
        sampling = SamplingParams(
            seed=work.seed or 0, temperature=work.temperature, top_p=work.top_p, max_tokens=work.output
        )
        self.core.add(AddRequest(request_id, work.prompt, sampling, adapter))
        await done
        return tokens

    async def step_until(self, done: asyncio.Future[None]) -> None:
        while not done.done():
            for message in self.core.step():
                self._deliver(message)
            await asyncio.sleep(0)  # let the clients whose requests ended send their next ones

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, StepOutput):
            for output in message.outputs:
                if output.error:
                    raise RuntimeError(output.error)
                self._on_tokens[output.request_id](output.token_ids, output.finish_reason is not None)

    def warm_up(self) -> list[Work]:
        """A short request for every adapter, which makes it resident; one for the base model if there is none."""
        return [Work([300 + index] * 16, 2, index) for index in range(len(self.keys))] or [Work([300] * 16, 2, None)]

    async def run(self, work: Sequence[Work], concurrency: int | None) -> tuple[list[Record], list[list[int]]]:
        clients = asyncio.ensure_future(drive(self.generate, work, concurrency))
        await asyncio.sleep(0)
        await self.step_until(clients)  # type: ignore[arg-type]
        return await clients


def load_adapters(core: EngineCore, model: Path, count: int) -> list[AdapterKey]:
    """The first adapters of a directory made by benchmarks.models, in the host's memory."""
    paths = [model / "adapters" / f"a{index:02d}" for index in range(count)]
    keys = [AdapterKey(f"shared/{path.name}", digest(path)) for path in paths]
    for key, path in zip(keys, paths, strict=True):
        core.want_adapter(WantAdapter(key, 1, str(path)))
    while core.has_work():
        core.step()
        time.sleep(0.002)  # the loader threads need the interpreter too
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
    parser.add_argument("--base", default="base", help="in it: a directory, or a file of benchmarks.gguf")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the base model, while it is loaded")
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 30)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    answers = take_stdout()

    config = EngineConfig(
        model=str(args.model / args.base),
        device=args.device,
        kernels=args.kernels,
        quantization=args.quantization,
        threads=args.threads,
        max_model_len=args.max_model_len,
        kv_cache_bytes=args.kv_cache_bytes,
        **({"max_num_batched_tokens": args.max_num_batched_tokens} if args.max_num_batched_tokens else {}),
    )
    started = time.perf_counter()
    core = EngineCore.load(config)
    driver = Driver(core, load_adapters(core, args.model, args.adapters))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(driver.run(driver.warm_up(), 8))
    kind = " ".join(filter(None, [core.limits.kernel_backend, form_of(args)]))
    about = {
        "system": f"Loraplex in-process ({kind})",
        "load_seconds": time.perf_counter() - started,
    }
    serve(driver.run, about, loop, answers, lambda: {"engine": time.process_time()})


if __name__ == "__main__":
    main()
