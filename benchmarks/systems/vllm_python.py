"""vLLM's asynchronous Python API, mixed adapters in one engine, streaming."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import serve, take_stdout
from benchmarks.workload import Work
from loraplex_service.bench.loops import drive
from loraplex_service.bench.records import Record


class Client:
    def __init__(self, engine: Any, adapters: Path) -> None:
        self._engine = engine
        self._adapters = adapters
        self._count = 0

    async def generate(self, work: Work, on_tokens: Callable[[int], None]) -> list[int]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=work.temperature,
            top_p=work.top_p,
            seed=work.seed,
            max_tokens=work.output,
            min_tokens=work.output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        lora = None
        if work.adapter is not None:
            name = f"a{work.adapter:02d}"
            lora = LoRARequest(name, work.adapter + 1, str(self._adapters / name))
        self._count += 1
        tokens: list[int] = []
        prompt = {"prompt_token_ids": work.prompt}
        async for output in self._engine.generate(prompt, params, f"r{self._count}", lora_request=lora):
            new = list(output.outputs[0].token_ids)
            if new:
                tokens += new
                on_tokens(len(new))
        return tokens

    async def run(self, work: Sequence[Work], concurrency: int | None) -> tuple[list[Record], list[list[int]]]:
        return await drive(self.generate, work, concurrency)


async def start(args: argparse.Namespace) -> Client:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options: dict[str, Any] = {}
    if args.adapters:
        options = {"enable_lora": True, "max_loras": args.adapters, "max_lora_rank": 16, "max_cpu_loras": args.adapters}
    engine_args = AsyncEngineArgs(
        model=str(args.model / "base"), dtype="bfloat16", max_model_len=args.max_model_len, max_num_seqs=64, **options
    )
    client = Client(AsyncLLM.from_engine_args(engine_args), args.model / "adapters")
    await client.run([Work([300 + i] * 16, 2, i) for i in range(args.adapters)] or [Work([300] * 16, 2, None)], 1)
    return client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
    parser.add_argument("--adapters", type=int, default=32, help="0: LoRA off")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-gib", type=int, default=2)
    args = parser.parse_args()
    answers = take_stdout()
    # Without these vLLM keeps a core for itself and computes on the others.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(args.kv_gib))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import vllm

    started = time.perf_counter()
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(start(args))
    name = "vLLM" if args.adapters else "vLLM, LoRA off"
    about = {"system": name, "version": vllm.__version__, "load_seconds": time.perf_counter() - started}
    serve(client.run, about, loop, answers)


if __name__ == "__main__":
    main()
