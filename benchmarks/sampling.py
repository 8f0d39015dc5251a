"""What a step takes longer that draws by parameters than one that takes the likeliest tokens.

    python -m benchmarks.sampling MODEL [--streams 32] [--rounds 20] [--history 4000] [--threads 2] [--out REPORT.md]

Loads MODEL/base, as `benchmarks.models` writes it, or a trained model: a directory or a GGUF file. One engine has so
many streams. Each of their steps is taken with other parameters, all in turns, so that whatever else the machine does
disturbs all alike; a figure is the median of the ratios to the greedy step of the same round, of the wall and of the
CPU time that the process used. Random weights give flat distributions; divided by a low temperature they are peaked.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.generation import is_untrained
from benchmarks.measure import machine
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.link.watermark import Watermark
from loraplex_engine.scheduling.request import Request
from loraplex_engine.scheduling.token_counts import TokenCounts

PROMPT = 32  # tokens
MOST_TOKENS = 100_000
GREEDY = "greedy"
TOP_P = {"temperature": 1.0, "top_p": 0.9}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}

Fields = Mapping[str, Any]


class Taken(NamedTuple):
    """What one step took, in seconds."""

    wall: float
    cpu: float


def kinds(vocab_size: int) -> dict[str, Fields]:
    """The parameters of each kind of step. The first is what the others are compared with."""
    chance = random.Random(0)
    allowed = tuple(chance.sample(range(vocab_size), 1000))
    bias = {token: chance.uniform(-2, 2) for token in chance.sample(range(vocab_size), 300)}
    return {
        GREEDY: {"temperature": 0.0},
        "temperature 0.7": {"temperature": 0.7},
        "top_p 0.9": TOP_P,
        "top_p 0.9, temperature 0.05": {"temperature": 0.05, "top_p": 0.9},
        "top_k 50, top_p 0.95": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
        "top_k 2000": {"temperature": 1.0, "top_k": 2000},
        "min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
        "typical_p 0.9": {"temperature": 1.0, "typical_p": 0.9},
        "greedy, repetition 1.1": {"temperature": 0.0, "repetition_penalty": 1.1},
        "top_p 0.9, all penalties": TOP_P | PENALTIES,
        "top_p 0.9, a bias of 300 tokens": TOP_P | {"logit_bias": bias},
        "top_p 0.9, 1,000 allowed tokens": TOP_P | {"allowed_token_ids": allowed},
        "top_p 0.9, two forbidden endings": TOP_P | {"min_tokens": MOST_TOKENS, "eos_token_ids": (1, 2)},
        "top_p 0.9, watermark": TOP_P | {"watermark": Watermark(key=b"key", context_tokens=1, gamma=0.5, delta=2.0)},
        "top_k 50, top_p 0.95, min_p 0.02, bias, all penalties": {
            **{"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "logit_bias": bias},
            **PENALTIES,
        },
        "greedy, 5 logprobs": {"temperature": 0.0, "num_logprobs": 5},
        "top_p 0.9, 5 logprobs": TOP_P | {"num_logprobs": 5},
    }


class Streams:
    """The streams of one engine, whose parameters change from step to step."""

    def __init__(self, config: EngineConfig, streams: int, history: int) -> None:
        self.core = EngineCore.load(config)
        self.vocab_size = self.core.limits.vocab_size
        chance = random.Random(1)
        sampling = SamplingParams(max_tokens=MOST_TOKENS, seed=0, temperature=0.0)
        for number in range(1, streams + 1):
            self.core.add(AddRequest(number, chance.choices(range(self.vocab_size), k=PROMPT), sampling))
        while any(request.num_output_tokens < 2 for request in self._requests):
            self.core.step()
        for request in self._requests:  # as if its prompt had been so long: to compute that would take minutes
            request.token_counts = TokenCounts(chance.choices(range(self.vocab_size), k=history))

    @property
    def _requests(self) -> Sequence[Request]:
        return tuple(self.core.scheduler.requests.values())

    def step(self, fields: Fields) -> Taken:
        """One token of each stream."""
        for request in self._requests:
            request.sampling = SamplingParams(**{"max_tokens": MOST_TOKENS, "seed": request.request_id, **fields})
        began = time.perf_counter(), time.process_time()
        self.core.step()
        return Taken(time.perf_counter() - began[0], time.process_time() - began[1])


def table(streams: Streams, rounds: int) -> Iterator[str]:
    """What each kind of step took, as lines of Markdown."""
    by_kind = kinds(streams.vocab_size)
    taken: dict[str, list[Taken]] = {name: [] for name in by_kind}
    names = list(by_kind)
    for number in range(rounds + 1):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            step = streams.step(by_kind[name])
            if number:  # the first round warms up
                taken[name].append(step)
    yield "| parameters | ms a step | wall, to greedy (quartiles) | CPU, to greedy (quartiles) |"
    yield "|---|---|---|---|"
    for name, steps in taken.items():
        middle = 1e3 * statistics.median(each.wall for each in steps)
        ratios = (_compared([each[kind] for each in steps], [each[kind] for each in taken[GREEDY]]) for kind in (0, 1))
        yield f"| {name} | {middle:.1f} | {' | '.join(ratios)} |"


def _compared(after: Sequence[float], before: Sequence[float]) -> str:
    low, median, high = statistics.quantiles((new / old for new, old in zip(after, before, strict=True)), n=4)
    return f"{median:.3f} ({low:.3f}, {high:.3f})"


def report(args: argparse.Namespace) -> Iterator[str]:
    about = machine()
    yield f"# What drawing costs: {args.model.name}, {datetime.now(UTC).date()}"
    yield ""
    yield (
        f"{about['cores']} cores of {about['cpu']}; {args.threads} threads, {args.streams} streams, medians of "
        f"{args.rounds} rounds; a history of {args.history} tokens where there are penalties."
    )
    yield ""
    yield f"    python -m benchmarks.sampling {shlex.join(sys.argv[1:])}"
    yield ""
    model = args.model / "base" if is_untrained(args.model) else args.model
    config = EngineConfig(model=str(model), threads=args.threads, max_model_len=2048, kv_cache_bytes=1 << 30)
    yield from table(Streams(config, args.streams, args.history), args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory made by benchmarks.models, or a trained model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--history", type=int, default=4000, help="tokens of each stream that penalties count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the report is written there, too")
    args = parser.parse_args()
    lines: list[str] = []
    for line in report(args):
        print(line, flush=True)
        lines.append(line)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
