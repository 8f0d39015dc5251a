"""The requests of `loraplex bench`: who is asked, how much, and when. Standard library only."""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loraplex_service.bench.loops import moments

SPREAD = 1.0  # sigma of the logarithm of lengths that are told by their mean
LEAST_TOKENS = 4  # of such a length
LENGTH_RULE = "N tokens, A-B (evenly from A to B), or ~MEAN (log-normal, as conversations are)"


@dataclass(frozen=True, slots=True)
class Request:
    """One request."""

    model: str
    prompt: Sequence[int]  # token ids
    output: int  # tokens
    seed: int  # of its draws
    moment: float = 0.0  # seconds from the start to its arrival, in an open loop


class Length(Protocol):
    """Draws a number of tokens."""

    def __call__(self, rng: random.Random, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What all requests of a run have in common."""

    models: tuple[str, ...]  # the ones that are asked most first
    skew: float  # exponent of Zipf's law: the n-th of them is asked n**-skew as often as the first. 0: all alike
    prompt: Length
    output: Length
    shared_prefix: int  # tokens that all prompts begin with
    longest: int  # tokens that prompt and output may have together; 0: any number
    requests: int
    seed: str  # the same seed makes the same requests
    variation: float = 1.0  # of the time between two requests of an open loop


def parse_length(text: str) -> Length:
    """ "128", "64-256" or "~161". Raises ValueError."""
    if found := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        least, most = int(found[1]), int(found[2] or found[1])
        if 0 < least <= most:
            return lambda rng: rng.randint(least, most)
    if (found := re.fullmatch(r"~(\d+)", text)) and int(found[1]):
        middle = math.log(int(found[1])) - SPREAD**2 / 2
        return lambda rng: max(LEAST_TOKENS, round(rng.lognormvariate(middle, SPREAD)))
    raise ValueError(f"{text!r} is no length: give {LENGTH_RULE}")


def make_requests(plan: Plan, pools: Mapping[str, Sequence[int]], rate: float | None) -> list[Request]:
    """The requests of a run: the same ones whatever the rate. Their prompts are tokens of the pool of who is asked, at
    random, so that only what they share on purpose is found in a cache.
    """
    rng = random.Random(plan.seed)
    weights = [(1 + place) ** -plan.skew for place in range(len(plan.models))]
    made = []
    for _ in range(plan.requests):
        [model] = rng.choices(plan.models, weights)
        prefix = random.Random(f"{plan.seed}/prefix").choices(pools[model], k=plan.shared_prefix)
        room = plan.longest - len(prefix) - 1
        prompt = min(plan.prompt(rng), max(1, room // 2)) if plan.longest else plan.prompt(rng)
        output = min(plan.output(rng), max(1, room - prompt + 1)) if plan.longest else plan.output(rng)
        made.append(Request(model, prefix + rng.choices(pools[model], k=prompt), output, rng.getrandbits(31)))
    if rate is None:
        return made
    when = moments(random.Random(f"{plan.seed}/moments"), rate, plan.variation, plan.requests)
    return [
        Request(each.model, each.prompt, each.output, each.seed, moment)
        for each, moment in zip(made, when, strict=True)
    ]
