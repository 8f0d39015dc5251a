"""What it saves to bring a shared prefix back from host memory or from files, rather than to compute it again.

    python -m benchmarks.prefix_cache MODEL [--tokens 6000] [--question 32] [--rounds 3] [--kernels cpu] [--dtype auto]

MODEL is a directory. In each round a prompt of --tokens random tokens and a short question is asked, in an engine that
runs nothing else: first when nothing is cached; then after another prompt has evicted it, with a second question; then
in a new engine, which has only the files. Reported is the time until the first token, and how many prompt tokens were
computed. The cache of the device has room for one prompt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.step import STALLED_SECONDS

ROWS = ("computed", "from host memory", "from files")


@dataclass(frozen=True)
class First:
    """How a request got its first token."""

    seconds: float
    computed: int  # prompt tokens


def ask(core: EngineCore, number: int, prompt: list[int]) -> First:
    before, began = core.stats().prompt_tokens, time.perf_counter()
    core.add(AddRequest(number, prompt, SamplingParams(seed=0, temperature=0.0, max_tokens=1), None))
    while True:
        events = core.step()
        for event in events:
            if isinstance(event, StepOutput) and any(output.token_ids for output in event.outputs):
                return First(time.perf_counter() - began, core.stats().prompt_tokens - before)
        if not events:
            time.sleep(STALLED_SECONDS)  # as the engine's process does


def config_of(args: argparse.Namespace, directory: str) -> EngineConfig:
    length = args.tokens + args.question + 16
    config = EngineConfig(
        model=str(args.model), kernels=args.kernels, dtype=args.dtype, max_model_len=length, max_num_seqs=1
    )
    probe = EngineCore.load(config)
    limits = probe.limits
    probe.close()
    block_bytes = limits.kv_cache_bytes // limits.total_blocks
    size = block_bytes * -(-length // limits.block_size)
    fields = {name: getattr(config, name) for name in EngineConfig.__struct_fields__}
    tiers = {"host_cache_bytes": 4 * size, "disk_cache_bytes": 5 * size, "disk_cache_directory": directory}
    return EngineConfig(**(fields | tiers | {"kv_cache_bytes": size}))


def measure(args: argparse.Namespace, seed: int) -> list[First]:
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(args, directory)
        core = EngineCore.load(config)
        vocab_size = core.limits.vocab_size

        def draw(count: int) -> list[int]:
            return random.integers(3, vocab_size, count).tolist()

        prefix = draw(args.tokens)
        found = [ask(core, 1, prefix + draw(args.question))]
        ask(core, 2, draw(args.tokens + args.question))
        found.append(ask(core, 3, prefix + draw(args.question)))
        ask(core, 4, draw(args.question))
        core.close()
        core = EngineCore.load(config)
        ask(core, 1, draw(args.question))
        found.append(ask(core, 2, prefix + draw(args.question)))
        core.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=6000, help="of the shared prefix")
    parser.add_argument("--question", type=int, default=32, help="tokens behind it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    rounds = [measure(args, seed) for seed in range(args.rounds)]
    print("| prefix | tokens computed | seconds to the first token | times faster |\n|---|---|---|---|")
    first = median(each[0].seconds for each in rounds)
    for row, name in enumerate(ROWS):
        seconds = median(each[row].seconds for each in rounds)
        print(f"| {name} | {rounds[0][row].computed} | {seconds:.3f} | {first / seconds:.1f} |")


if __name__ == "__main__":
    main()
