"""Who gets how many tokens when tenants ask for more than the engine can do.

    python -m benchmarks.fairness [--model DIR] [--seconds 20] [--out RESULT.json]

Two tenants of weights 1 and 2 keep three times as many requests in the engine as run at once, with prompts and outputs
of different lengths; in the middle a third one of weight 1 comes. Counts the tokens of each by their prices, in the
second half of the time before and in the second half of the time after, and says how long the third waited for its
first token and for its share of the places. The model is the demo's unless another directory is named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.fairness import OUTPUT_PRICE, PROMPT_PRICE

DEMO = Path(__file__).resolve().parents[1] / "demo/loraplex_demo/models/storyteller"
PLACES = 16
BACKLOG = 3 * PLACES  # requests of each tenant in the engine


@dataclass(frozen=True)
class Tenant:
    """What it is due, and what it asks for."""

    name: str
    weight: float
    prompt: tuple[int, int]  # tokens, at least and at most
    output: tuple[int, int]


FIRST = Tenant("one", 1.0, (16, 64), (16, 64))
SECOND = Tenant("two", 2.0, (4, 128), (8, 32))
THIRD = Tenant("three", 1.0, (16, 64), (16, 64))


class Load:
    """Keeps the backlogs of the tenants full, and counts what each of them gets."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.served: defaultdict[str, float] = defaultdict(float)  # tokens by their prices
        self.first_token: dict[str, float] = {}  # seconds of time.perf_counter
        self._random = random.Random(0)
        self._ids = itertools.count()
        self._open: dict[int, tuple[Tenant, int]] = {}  # by request id: whose, and prompt tokens not yet counted

    def begin(self, tenant: Tenant) -> None:
        for _ in range(BACKLOG):
            self._ask(tenant)

    def run(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.step()

    def step(self) -> None:
        for message in self.core.step():
            for output in message.outputs if isinstance(message, StepOutput) else ():
                tenant, prompt_tokens = self._open[output.request_id]
                self.first_token.setdefault(tenant.name, time.perf_counter())
                self.served[tenant.name] += PROMPT_PRICE * prompt_tokens + OUTPUT_PRICE * len(output.token_ids)
                self._open[output.request_id] = tenant, 0
                if output.finish_reason is not None:
                    del self._open[output.request_id]
                    self._ask(tenant)

    def places(self, tenant: Tenant) -> int:
        """Sequences of this tenant that run now."""
        return sum(request.tenant == tenant.name for request in self.core.scheduler.running)

    def _ask(self, tenant: Tenant) -> None:
        request_id = next(self._ids)
        length, max_tokens = (self._random.randint(*bounds) for bounds in (tenant.prompt, tenant.output))
        prompt = [self._random.randrange(3, self.core.limits.vocab_size) for _ in range(length)]
        sampling = SamplingParams(seed=request_id, max_tokens=max_tokens)
        self._open[request_id] = tenant, length
        self.core.add(AddRequest(request_id, prompt, sampling, tenant=tenant.name, weight=tenant.weight))


def shares(load: Load, seconds: float) -> dict[str, float]:
    """Tokens per second of each tenant, over its weight and over what the first one gets. Fair is 1 for all."""
    load.run(seconds / 2)
    load.served.clear()
    load.run(seconds / 2)
    due = {tenant.name: tenant.weight for tenant in (FIRST, SECOND, THIRD)}
    first = load.served[FIRST.name]
    return {name: tokens / due[name] / first for name, tokens in sorted(load.served.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = EngineConfig(model=args.model, max_num_seqs=PLACES, kv_cache_bytes=256 << 20)
    load = Load(EngineCore.load(config))
    load.begin(FIRST)
    load.begin(SECOND)
    before = shares(load, args.seconds / 2)
    load.begin(THIRD)
    came = time.perf_counter()
    while load.places(THIRD) < PLACES * THIRD.weight / (FIRST.weight + SECOND.weight + THIRD.weight):
        load.step()
    share_after = time.perf_counter() - came
    after = shares(load, args.seconds / 2)
    load.core.close()
    result = {
        "tokens over weight, of two": before,
        "tokens over weight, of three": after,
        "third's first token after seconds": load.first_token[THIRD.name] - came,
        "third's share of the places after seconds": share_after,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
