"""The work that every system gets: the same token ids, lengths and adapters. Standard library only.

Prompts are uniform random token ids, a new seed for every repeat: no repeat finds another's prefix in a cache.
Decoding is greedy and ignores the end of sequence: every system produces the same number of tokens.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

SEED = 20261121
VOCAB = 32000
FIRST_TOKEN_ID = 300  # below are the tokenizer's special and byte tokens


@dataclass(frozen=True)
class Scenario:
    """One kind of load. Lengths in tokens; request i uses adapter i mod num_adapters, the base model if that is 0."""

    name: str
    num_adapters: int
    shared_prefix: int = 0
    prompt: int = 128  # of each request's own
    output: int = 64


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("base", 0),
        Scenario("lora1", 1),
        Scenario("lora8", 8),
        Scenario("lora32", 32),
        Scenario("prefix-base", 0, shared_prefix=512, prompt=32, output=32),
        Scenario("prefix-lora8", 8, shared_prefix=512, prompt=32, output=32),
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
        )
        for index in range(count)
    ]
