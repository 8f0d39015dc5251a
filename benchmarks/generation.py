"""What ways of generating cost and save, each against generating without it, in turns in one run.

    python -m benchmarks.generation MODEL [--parts drafts forms] [--pairs 10] [--tokens 200] [--threads 2]
        [--vllm-python PYTHON] [--out REPORT.md]

Loads MODEL/base, as `benchmarks.models` writes it, or a trained model: a directory or a GGUF file. A part names kinds
of work; of each the same requests run with and without, in turns, so that whatever else the machine does disturbs both
alike. The figures are medians of the pairs' ratios. With the Python of an environment that has vLLM, the same requests
run there as well; VLLM_PRELOAD may name the libraries that it is to be started with, as its documentation advises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders
from tokenizers.models import WordLevel

from benchmarks.forms import PEOPLE, STREAMS
from benchmarks.measure import machine
from benchmarks.systems.vllm_generation import Vllm
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftConfig, DraftKind, Drafts
from loraplex_engine.link.grammar import choice_grammar, schema_grammar
from loraplex_engine.link.messages import AddRequest, RequestOutput, SetVocabulary, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_service.requests.forms import compilable
from loraplex_service.text import ChatTemplate, Conversation, TemplateRenderer, Tokenizer

T = TypeVar("T")

PROMPT = 200  # tokens
EDITED = 25  # one token of so many is another in what is rewritten
COPIED_CHARS = 100  # of a passage, where a copy has begun
DRAFTS = 8  # of a step at most
FEW = 16  # tokens to draw from, so that every pair of them has occurred before


class Work(NamedTuple):
    """One request, in words that every system understands."""

    prompt: list[int]
    seed: int
    temperature: float
    allowed: tuple[int, ...] = ()  # token ids; empty: all
    choice: str = ""  # the only text that the output may be
    schema: Mapping[str, Any] | None = None  # of the output

    @property
    def grammar(self) -> str:
        if self.schema is not None:
            return compilable(schema_grammar(self.schema))
        return choice_grammar([self.choice]) if self.choice else ""


class Subject:
    """One engine, driven step by step, and what its latest requests came to."""

    def __init__(self, config: EngineConfig) -> None:
        self.core = EngineCore.load(config)
        self.vocab_size = self.core.limits.vocab_size
        self.tokenizer = Tokenizer.load(Path(config.model))
        self.core.set_vocabulary(SetVocabulary(list(self.tokenizer.vocabulary)))
        self._next_id = 0

    def close(self) -> None:
        self.core.close()

    def begin(self, works: list[Work], drafts: Drafts, tokens: int) -> None:
        """Start requests, and compute the first token of each."""
        self.outputs: list[RequestOutput] = []
        for work in works:
            self._next_id += 1
            allowed = work.allowed or None
            sampling = SamplingParams(
                max_tokens=tokens, seed=work.seed, temperature=work.temperature, allowed_token_ids=allowed
            )
            self.core.add(AddRequest(self._next_id, work.prompt, sampling, grammar=work.grammar, drafts=drafts))
        while len({output.request_id for output in self.outputs}) < len(works):
            self._take()
        self.num_first = len(self.token_ids)
        self.seconds = 0.0  # from then on

    def step(self) -> None:
        if self.core.has_work():
            began = time.perf_counter()
            self._take()
            self.seconds += time.perf_counter() - began

    def run(self, works: list[Work], drafts: Drafts, tokens: int) -> float:
        """Run requests to their ends. Returns their tokens per second."""
        self.begin(works, drafts, tokens)
        while self.core.has_work():
            self.step()
        return self.tokens_per_second

    def _take(self) -> None:
        for event in self.core.step():
            self.outputs += event.outputs if isinstance(event, StepOutput) else ()

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def tokens_per_second(self) -> float:
        return (len(self.token_ids) - self.num_first) / self.seconds


def spelt(token: int) -> str:
    """What a token adds to a text; no other token is spelt so, nor are several."""
    return f"{token:x} "


def is_untrained(model: Path) -> bool:
    """Whether `benchmarks.models` wrote it."""
    return (model / "base").is_dir()


def spell_all(model: Path, folder: Path) -> Path:
    """Write the model with another tokenizer into a folder: each text has one spelling, so a form can force tokens."""
    for file in model.iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file.resolve())
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    vocabulary = {spelt(token).replace(" ", "Ġ"): token for token in range(3, size)}
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **vocabulary}
    tokenizer = TokenizerFile(WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(model / "tokenizer_config.json", folder)
    return folder


# ---- drafts ----------------------------------------------------------------------------------------------------------


def rewriting(subject: Subject, seed: int, tokens: int) -> Work:
    """The prompt again, with a change now and then. A form forces it: random weights would not do so by themselves."""
    chance = random.Random(seed)
    prompt = chance.choices(range(3, subject.vocab_size), k=PROMPT)
    edited = [
        chance.randrange(3, subject.vocab_size) if place % EDITED == EDITED - 1 else token
        for place, token in enumerate(prompt)
    ]
    return Work(prompt, seed, 0.0, choice="".join(map(spelt, edited[:tokens])) + "end")


def looping(subject: Subject, seed: int, tokens: int) -> Work:
    """What the model writes by itself, greedily, behind 300 tokens of its own: random weights go in circles."""
    prompt = random.Random(seed).choices(range(3, subject.vocab_size), k=20)
    subject.run([Work(prompt, 0, 0.0)], Drafts(), 300)
    return Work(prompt + subject.token_ids, 0, 0.0)


def drawing(subject: Subject, seed: int, tokens: int) -> Work:
    """Drawn from the whole vocabulary: there is nothing to copy."""
    prompt = random.Random(seed).choices(range(3, subject.vocab_size), k=PROMPT)
    return Work(prompt, seed, 1.0)


def drawing_from_few(subject: Subject, seed: int, tokens: int) -> Work:
    """Drawn from few tokens: everything has occurred before, and nothing follows from it."""
    few = tuple(random.Random(seed).sample(range(3, subject.vocab_size), FEW))
    prompt = random.Random(seed).choices(few, k=PROMPT)
    return Work(prompt, seed, 1.0, allowed=few)


def passage(seed: int) -> str:
    """A paragraph of our own pages."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    paragraphs = [each for page in pages for each in page.read_text().split("\n\n")]
    return random.Random(seed).choice([each for each in paragraphs if 500 < len(each) < 1000 and each[0].isalpha()])


def repeating(subject: Subject, seed: int, tokens: int) -> Work:
    """A passage that a trained model is asked to repeat, and perhaps does."""
    content = f"Repeat this text, word by word, and write nothing else:\n\n{passage(seed)}"
    conversation = Conversation([{"role": "user", "content": content}], add_generation_prompt=True)
    text = asyncio.run(_rendered(subject.tokenizer.chat_template, conversation))
    return Work(subject.tokenizer.encode(text, add_special_tokens=False), seed, 0.0)


def continuing(subject: Subject, seed: int, tokens: int) -> Work:
    """A passage, and the beginning of its copy, as in an edited file: a trained model goes on copying by itself."""
    text = passage(seed)
    return Work(subject.tokenizer.encode(f"{text}\n\n{text[:COPIED_CHARS]}", add_special_tokens=False), seed, 0.0)


async def _rendered(template: ChatTemplate | None, conversation: Conversation) -> str:
    async with TemplateRenderer() as renderer:
        return await renderer.render(template, conversation)


RANDOM: Mapping[str, Callable[[Subject, int, int], Work]] = {
    "random: drawn from the whole vocabulary": drawing,
    f"random: drawn from {FEW} tokens, so that all pairs have occurred": drawing_from_few,
}
DRAFTED_TRAINED = {
    "continuing: a passage and the beginning of its copy, greedy": continuing,
    "repeating: asked to repeat a passage, greedy": repeating,
    **RANDOM,
}
DRAFTED = {
    f"rewriting: the prompt again, one token of {EDITED} changed, forced by a form": rewriting,
    "looping: greedy, in the circles of random weights": looping,
    **RANDOM,
}


def drafts(args: argparse.Namespace) -> Iterator[str]:
    """Drafts against none, of a single stream."""
    with ExitStack() as stack:
        folder, kinds = args.model, DRAFTED_TRAINED
        if is_untrained(args.model):
            folder = spell_all(args.model / "base", Path(stack.enter_context(tempfile.TemporaryDirectory())))
            kinds = DRAFTED
        without = Subject(_config(args, folder))
        stack.callback(without.close)
        with_drafts = Subject(_config(args, folder, drafts=DraftConfig(kind=DraftKind.NGRAM, tokens=DRAFTS)))
        stack.callback(with_drafts.close)
        peers: list[Vllm] = []
        if args.vllm_python:
            started = (Vllm(args.vllm_python, folder, args.threads, tokens) for tokens in (0, DRAFTS))
            peers += (stack.enter_context(peer) for peer in started)
        rates_head = "tokens/s without | tokens/s with drafts | with / without (quartiles)"
        yield f"| work, one stream | system | {rates_head} | drafts | right |"
        yield "|---|---|---|---|---|---|---|"
        for name, make in kinds.items():
            rates: list[Sequence[float]] = []
            peer_rates: list[Sequence[float]] = []
            counts: list[tuple[int, int]] = []
            for seed in range(args.pairs):
                work = make(without, seed, args.tokens)
                _in_turns(without, with_drafts, work, args.tokens)
                assert with_drafts.token_ids == without.token_ids
                rates.append((without.tokens_per_second, with_drafts.tokens_per_second))
                counts += [(output.num_drafts, output.num_accepted_drafts) for output in with_drafts.outputs]
                if peers:
                    measured = [peer.run([work._asdict()], args.tokens) for peer in _turned(peers, seed)]
                    peer_rates.append(_turned(measured, seed))
            drafted = [str(sum(each)) for each in zip(*counts, strict=True)]
            yield f"| {name} | Loraplex | {_compared(rates)} | {' | '.join(drafted)} |"
            if peers:
                yield f"| | {peers[0].name} | {_compared(peer_rates)} | | |"


def _in_turns(without: Subject, with_drafts: Subject, work: Work, tokens: int) -> None:
    without.begin([work], Drafts(), tokens)
    with_drafts.begin([work], Drafts(DraftKind.NGRAM, DRAFTS), tokens)
    turns = [without, with_drafts]
    while without.core.has_work() or with_drafts.core.has_work():
        for subject in turns:
            subject.step()
        turns.reverse()


# ---- forms -----------------------------------------------------------------------------------------------------------


def forms(args: argparse.Namespace) -> Iterator[str]:
    """Streams that keep to a JSON schema against streams that are free, a whole batch each."""
    with ExitStack() as stack:
        model = args.model / "base" if is_untrained(args.model) else args.model
        subject = Subject(_config(args, model))
        stack.callback(subject.close)
        systems = {"Loraplex": lambda works: subject.run(works, Drafts(), args.tokens)}
        if args.vllm_python:
            peer = stack.enter_context(Vllm(args.vllm_python, model, args.threads))
            systems[peer.name] = lambda works: peer.run([work._asdict() for work in works], args.tokens)
        chance = random.Random(0)
        prompts = [chance.choices(range(3, subject.vocab_size), k=16) for _ in range(STREAMS)]
        free = [Work(prompt, seed, 1.0) for seed, prompt in enumerate(prompts)]
        formed = [work._replace(schema=PEOPLE) for work in free]
        yield f"| system, {STREAMS} streams | tokens/s free | tokens/s in a form | in a form / free (quartiles) |"
        yield "|---|---|---|---|"
        rates: dict[str, list[Sequence[float]]] = {name: [] for name in systems}
        for run in systems.values():
            run(formed)  # compiles the schema
        for pair in range(args.pairs):
            for name, run in systems.items():
                rates[name].append(_turned([run(each) for each in _turned([free, formed], pair)], pair))
        for name, each in rates.items():
            yield f"| {name} | {_compared(each)} |"


def _turned(pair: Sequence[T], number: int) -> Sequence[T]:
    """The pair, with the other one first every other time."""
    return pair[::-1] if number % 2 else pair


def _compared(rates: Sequence[Sequence[float]]) -> str:
    """The medians of both rates, and of the second's ratio to the first."""
    low, median, high = statistics.quantiles((after / before for before, after in rates), n=4)
    middle = [f"{statistics.median(each):.1f}" for each in zip(*rates, strict=True)]
    return f"{' | '.join(middle)} | {median:.3f} ({low:.3f}, {high:.3f})"


def _config(args: argparse.Namespace, model: Path, **more: Any) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        threads=args.threads,
        max_model_len=1024,
        kv_cache_bytes=1 << 29,
        enable_prefix_caching=False,
        **more,
    )


PARTS: Mapping[str, Callable[[argparse.Namespace], Iterator[str]]] = {"drafts": drafts, "forms": forms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory made by benchmarks.models, or a trained model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=PROMPT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm-python", type=Path, help="the Python of an environment that has vLLM")
    parser.add_argument("--out", type=Path, help="the report is written there, too")
    args = parser.parse_args()
    lines: list[str] = []
    for line in _report(args):
        print(line, flush=True)  # at once: a run that is cut short has told what it found
        lines.append(line)
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


def _report(args: argparse.Namespace) -> Iterator[str]:
    yield from _heading(args)
    for part in args.parts:
        yield from ("", f"## {part}", "")
        yield from PARTS[part](args)


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
