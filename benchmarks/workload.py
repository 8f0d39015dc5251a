"""The work that every system gets: the same token ids, lengths and adapters. Standard library only.

Prompts are uniform random token ids, a new seed for every repeat: no repeat finds another's prefix in a cache.
Decoding ignores the end of sequence: every system produces the same number of tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import asdict, dataclass
from typing import Any

SEED = 20261121
VOCAB = 32000
FIRST_TOKEN_ID = 300  # below are the tokenizer's special and byte tokens
TEMPERATURE, TOP_P = 0.8, 0.95  # of requests that are sampled


@dataclass(frozen=True)
class Scenario:
    """One kind of load. Lengths in tokens; request i uses adapter i mod num_adapters, the base model if that is 0."""

    name: str
    num_adapters: int
    shared_prefix: int = 0
    prompt: int = 128  # of each request's own
    output: int = 64
    is_sampled: bool = False

    @property
    def longest(self) -> int:
        """Tokens of its longest request."""
        return self.shared_prefix + self.prompt + self.output


@dataclass(frozen=True)
class Traffic:
    """Requests that come by themselves, sampled, of many lengths, most of them for a few adapters.

    Lengths are log-normal with the means, in tokens, that conversations of ShareGPT have (arXiv 2309.06180, figure 11),
    but never so long that a request would have more than `longest` tokens. The time between two requests is a gamma
    distribution whose coefficient of variation is 1.4: they come in bursts, as in production (arXiv 2401.17644).
    """

    name: str
    num_adapters: int
    prompt: float = 161
    output: float = 338
    spread: float = 1.0  # sigma of the logarithm of lengths
    longest: int = 1024
    num_requests: int = 60


TRAFFIC = {traffic.name: traffic for traffic in (Traffic("chat-base", 0), Traffic("chat", 20))}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("base", 0),
        Scenario("lora1", 1),
        Scenario("lora8", 8),
        Scenario("lora32", 32),
        Scenario("prefix-base", 0, shared_prefix=512, prompt=32, output=32),
        Scenario("prefix-lora8", 8, shared_prefix=512, prompt=32, output=32),
        Scenario("sampled-lora8", 8, is_sampled=True),
        Scenario("prompts-2000", 0, prompt=2000, output=16),
        Scenario("prompts-2000-lora8", 8, prompt=2000, output=16),
    )
}

# enough requests for a steady state, few enough for a repeat of seconds
NUM_REQUESTS = {1: 6, 8: 24, 32: 64}


@dataclass(frozen=True)
class Work:
    """One request."""

    prompt: list[int]  # token ids
    output: int  # tokens
    adapter: int | None  # index, or None for the base model
    seed: int | None = None  # of sampling with TEMPERATURE and TOP_P; None: greedy
    moment: float = 0.0  # seconds from the start to its arrival, where requests come by themselves

    @property
    def temperature(self) -> float:
        return 0.0 if self.seed is None else TEMPERATURE

    @property
    def top_p(self) -> float:
        return 1.0 if self.seed is None else TOP_P

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Work:
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_work(scenario: Scenario, concurrency: int, repeat: int) -> list[Work]:
    """The requests of one repeat: the same for every system, different for every repeat."""
    rng = random.Random(f"{SEED}/{scenario}/{concurrency}/{repeat}")

    def tokens(count: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN_ID, VOCAB) for _ in range(count)]

    prefix = tokens(scenario.shared_prefix)
    count = NUM_REQUESTS.get(concurrency, 2 * concurrency)
    return [
        Work(
            prefix + tokens(scenario.prompt),
            scenario.output,
            index % scenario.num_adapters if scenario.num_adapters else None,
            rng.getrandbits(31) if scenario.is_sampled else None,
        )
        for index in range(count)
    ]


def make_traffic(traffic: Traffic, rate: float, repeat: int) -> list[Work]:
    """The requests of one repeat, `rate` a second on average: the same ones at every rate, closer together."""
    rng = random.Random(f"{SEED}/{traffic}/{repeat}")
    weights = [1 / (1 + place) for place in range(traffic.num_adapters)]
    moments = itertools.accumulate(rng.gammavariate(0.5, 2 / rate) for _ in range(traffic.num_requests))

    def length(mean: float, most: int) -> int:
        drawn = rng.lognormvariate(math.log(mean) - traffic.spread**2 / 2, traffic.spread)
        return min(max(4, round(drawn)), most)

    work = []
    for moment in moments:
        prompt = length(traffic.prompt, traffic.longest // 2)
        work.append(
            Work(
                [rng.randrange(FIRST_TOKEN_ID, VOCAB) for _ in range(prompt)],
                length(traffic.output, traffic.longest - prompt),
                rng.choices(range(traffic.num_adapters), weights)[0] if weights else None,
                rng.getrandbits(31),
                moment,
            )
        )
    return work
