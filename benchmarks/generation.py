"""What ways of generating cost and save, each against generating without it, in turns in one run.

    python -m benchmarks.generation MODEL [--parts drafts] [--pairs 10] [--tokens 200] [--threads 2] [--out REPORT.md]

Loads MODEL/base, as `benchmarks.models` writes it, into two engines. A part names kinds of work; of each the same
request runs with and without, in turns, step by step, so that whatever else the machine does disturbs both alike. The
figures are medians of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import machine
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind, Drafts
from loraplex_engine.link.grammar import choice_grammar
from loraplex_engine.link.messages import AddRequest, RequestOutput, SetVocabulary, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams

PROMPT = 200  # tokens
EDITED = 25  # one token of so many is another in what is rewritten
DRAFTS = 8  # of a step at most
FEW = 16  # tokens to draw from, so that every pair of them has occurred before


class Work(NamedTuple):
    """One request, without its id."""

    prompt: list[int]
    asked: Mapping[str, Any]  # of its sampling
    grammar: str = ""


class Subject:
    """One engine, driven step by step, and what the latest request came to."""

    def __init__(self, config: EngineConfig) -> None:
        self.core = EngineCore.load(config)
        self.vocab_size = self.core.limits.vocab_size
        self.core.set_vocabulary(SetVocabulary([spelt(token).encode() for token in range(self.vocab_size)]))
        self._next_id = 0

    def begin(self, work: Work, drafts: Drafts, tokens: int) -> None:
        """Start a request, and compute its first token."""
        self._next_id += 1
        self.outputs: list[RequestOutput] = []
        sampling = SamplingParams(max_tokens=tokens, **work.asked)
        self.core.add(AddRequest(self._next_id, work.prompt, sampling, grammar=work.grammar, drafts=drafts))
        while not self.outputs:
            self._take()
        self.seconds = 0.0  # from its first token on

    def step(self) -> None:
        if self.core.has_work():
            began = time.perf_counter()
            self._take()
            self.seconds += time.perf_counter() - began

    def _take(self) -> None:
        for event in self.core.step():
            self.outputs += event.outputs if isinstance(event, StepOutput) else ()

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def tokens_per_second(self) -> float:
        return (len(self.token_ids) - len(self.outputs[0].token_ids)) / self.seconds


def spelt(token: int) -> str:
    """What a token adds to a text; no other token is spelt so, nor are several."""
    return f"{token:x} "


# ---- drafts ----------------------------------------------------------------------------------------------------------


def rewriting(subject: Subject, seed: int, tokens: int) -> Work:
    """The prompt again, with a change now and then. A form forces it: random weights would not do so by themselves."""
    chance = random.Random(seed)
    prompt = chance.choices(range(3, subject.vocab_size), k=PROMPT)
    edited = [
        chance.randrange(3, subject.vocab_size) if place % EDITED == EDITED - 1 else token
        for place, token in enumerate(prompt)
    ]
    grammar = choice_grammar(["".join(map(spelt, edited[:tokens])) + "end"])
    return Work(prompt, {"seed": seed, "temperature": 0.0}, grammar)


def looping(subject: Subject, seed: int, tokens: int) -> Work:
    """What the model writes by itself, greedily, behind 300 tokens of its own: random weights go in circles."""
    prompt, asked = random.Random(seed).choices(range(3, subject.vocab_size), k=20), {"seed": 0, "temperature": 0.0}
    subject.begin(Work(prompt, asked), Drafts(), 300)
    while subject.core.has_work():
        subject.step()
    return Work(prompt + subject.token_ids, asked)


def drawing(subject: Subject, seed: int, tokens: int) -> Work:
    """Drawn from the whole vocabulary: there is nothing to copy."""
    prompt = random.Random(seed).choices(range(3, subject.vocab_size), k=PROMPT)
    return Work(prompt, {"seed": seed, "temperature": 1.0})


def drawing_from_few(subject: Subject, seed: int, tokens: int) -> Work:
    """Drawn from few tokens: everything has occurred before, and nothing follows from it."""
    few = tuple(random.Random(seed).sample(range(3, subject.vocab_size), FEW))
    prompt = random.Random(seed).choices(few, k=PROMPT)
    return Work(prompt, {"seed": seed, "temperature": 1.0, "allowed_token_ids": few})


DRAFTED: Mapping[str, Callable[[Subject, int, int], Work]] = {
    f"rewriting: the prompt again, one token of {EDITED} changed, forced by a form": rewriting,
    "looping: greedy, in the circles of random weights": looping,
    "random: drawn from the whole vocabulary": drawing,
    f"random: drawn from {FEW} tokens, so that all pairs have occurred": drawing_from_few,
}


def drafts(args: argparse.Namespace) -> Iterator[str]:
    """Drafts against none, of a single stream."""
    config = EngineConfig(
        model=str(args.model / "base"),
        threads=args.threads,
        max_model_len=1024,
        kv_cache_bytes=1 << 28,
        enable_prefix_caching=False,
        drafts=DraftConfig(kind=DraftKind.NGRAM, tokens=DRAFTS),
    )
    without, with_drafts = Subject(config), Subject(config)
    yield "| work, one stream | tokens/s without | tokens/s with drafts | with / without (quartiles) | drafts | right |"
    yield "|---|---|---|---|---|---|"
    for name, make in DRAFTED.items():
        ratios, rates, counts = [], [], []
        for seed in range(args.pairs):
            _in_turns(without, with_drafts, make(without, seed, args.tokens), args.tokens)
            assert with_drafts.token_ids == without.token_ids
            rates.append((without.tokens_per_second, with_drafts.tokens_per_second))
            ratios.append(rates[-1][1] / rates[-1][0])
            counts += [(output.num_drafts, output.num_accepted_drafts) for output in with_drafts.outputs]
        low, median, high = statistics.quantiles(ratios, n=4)
        middle = [f"{statistics.median(each):.1f}" for each in zip(*rates, strict=True)]
        drafted = [str(sum(each)) for each in zip(*counts, strict=True)]
        yield f"| {name} | {' | '.join([*middle, f'{median:.3f} ({low:.3f}, {high:.3f})', *drafted])} |"
    without.core.close()
    with_drafts.core.close()


def _in_turns(without: Subject, with_drafts: Subject, work: Work, tokens: int) -> None:
    without.begin(work, Drafts(), tokens)
    with_drafts.begin(work, Drafts(DraftKind.NGRAM, DRAFTS), tokens)
    turns = [without, with_drafts]
    while without.core.has_work() or with_drafts.core.has_work():
        for subject in turns:
            subject.step()
        turns.reverse()


PARTS: Mapping[str, Callable[[argparse.Namespace], Iterator[str]]] = {"drafts": drafts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory made by benchmarks.models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=PROMPT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the report is written there, too")
    args = parser.parse_args()
    lines = [*_heading(args), *(line for part in args.parts for line in ("", f"## {part}", "", *PARTS[part](args)))]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


def _heading(args: argparse.Namespace) -> list[str]:
    about = machine()
    return [
        f"# Ways of generating: {args.model.name}, {datetime.now(UTC).date()}",
        "",
        f"{about['cores']} cores of {about['cpu']}; {args.threads} threads, {args.tokens} tokens of output, medians of "
        f"{args.pairs} pairs.",
        "",
        f"    python -m benchmarks.generation {shlex.join(sys.argv[1:])}",
    ]


if __name__ == "__main__":
    main()
