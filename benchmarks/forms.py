"""What forms cost: per token, for the first request with a schema, and to others while a large one is compiled.

    python -m benchmarks.forms --tokenizer DIR [--model llama-160m] [--rounds 7] [--out RESULT.json]

The engine runs in this process, with random weights and the vocabulary of the tokenizer in DIR. Streams with and
without a form take turns, in rounds of whole batches, and each pair of rounds gives one ratio: so what else the machine
does falls on both. The seconds of the processor are given too, which neighbours change less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import machine
from benchmarks.models import SHAPES
from loraplex_engine.core import EngineCore
from loraplex_engine.execution.bad_words import TokenTexts
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.grammar import schema_grammar
from loraplex_engine.link.messages import AddRequest, SetVocabulary, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.scheduling.form import FormKey
from loraplex_engine.scheduling.forms import Vocabulary
from loraplex_service.requests.forms import compilable
from loraplex_service.text import Tokenizer

STREAMS = 32
STEPS = 24  # of a round that are measured, behind those that compute the prompts

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": _PERSON, "minItems": 1000}  # goes on as long as it is watched


def tools(count: int) -> dict[str, Any]:
    """A call of one of so many tools, each with arguments of its own."""

    def call(number: int) -> dict[str, Any]:
        arguments = {f"a{number}_{each}": {"type": kind} for each, kind in enumerate(("string", "integer", "boolean"))}
        properties = {"name": {"const": f"tool_{number}"}, "arguments": {"type": "object", "properties": arguments}}
        return {"type": "object", "properties": properties, "required": ["name", "arguments"]}

    return {"anyOf": [call(number) for number in range(count)]}


class Bench:
    """One engine, and what its steps take."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.core = EngineCore.load(
            EngineConfig(model=str(folder), kv_cache_bytes=1 << 30, max_num_seqs=STREAMS + 8, max_model_len=2048)
        )
        self.vocabulary = list(tokenizer.vocabulary)
        began = time.perf_counter()
        self.core.set_vocabulary(SetVocabulary(self.vocabulary))
        self.warm_seconds = time.perf_counter() - began
        self._ids = iter(range(1 << 30))

    def add(self, grammar: str = "", seed: int = 0) -> int:
        number = next(self._ids)
        sampling = SamplingParams(seed=seed, max_tokens=1900, temperature=1.0)
        self.core.add(AddRequest(number, [1, 2, 3, number % 1000], sampling, grammar=grammar))
        return number

    def step(self) -> float:
        """The seconds of a step. Raises RuntimeError if a request ended."""
        began = time.perf_counter()
        messages = self.core.step()
        seconds = time.perf_counter() - began
        for message in messages:
            for output in message.outputs if isinstance(message, StepOutput) else ():
                if output.finish_reason is not None:
                    raise RuntimeError(f"a stream ended: {output}")
        return seconds

    def until_running(self, count: int) -> None:
        while len(self.core.scheduler.running) < count or any(map(len, self.core.scheduler.rooms)):
            self.step()
        for _ in range(3):
            self.step()

    def round(self, grammar: str) -> tuple[float, float]:
        """The median seconds of a step of a whole batch, and the mean seconds of the processor."""
        streams = [self.add(grammar, seed) for seed in range(STREAMS)]
        self.until_running(STREAMS)
        processor = time.process_time()
        seconds = [self.step() for _ in range(STEPS)]
        processor = (time.process_time() - processor) / STEPS
        self.core.abort(streams)
        return statistics.median(seconds), processor


def per_token(bench: Bench, rounds: int) -> dict[str, Any]:
    """The cost of forms to the steps of a batch, in turns with steps without."""
    grammar = compilable(schema_grammar(PEOPLE))
    bench.round(grammar)
    pairs = [(bench.round(""), bench.round(grammar)) for _ in range(rounds)]
    apply = bench.core.runner.form_masks.fill
    spent: list[float] = []

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return apply(*arguments)
        finally:
            spent.append(time.perf_counter() - began)

    bench.core.runner.form_masks.fill = timed  # type: ignore[method-assign, assignment]
    bench.round(grammar)
    bench.core.runner.form_masks.fill = apply  # type: ignore[method-assign]
    return {
        "plain_ms": 1e3 * statistics.median(plain[0] for plain, _ in pairs),
        "formed_ms": 1e3 * statistics.median(formed[0] for _, formed in pairs),
        "ratio": statistics.median(formed[0] / plain[0] for plain, formed in pairs),
        "processor_ratio": statistics.median(formed[1] / plain[1] for plain, formed in pairs),
        "fill_ms": 1e3 * statistics.median(spent),
    }


def median_ms(do: Callable[[], object], times: int = 15) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def first_schema(bench: Bench) -> dict[str, Any]:
    """What the first request with a schema waits for: the service's check, and the engine's compiling."""
    vocabulary = Vocabulary(bench.vocabulary, TokenTexts(bench.vocabulary))
    grammar = schema_grammar(_PERSON)
    many = schema_grammar(tools(400))
    return {
        "vocabulary_ms": 1e3 * bench.warm_seconds,
        "check_ms": median_ms(lambda: compilable(grammar)),
        "compile_ms": median_ms(lambda: vocabulary.form(FormKey(grammar, (), (), ()))),
        "check_400_tools_ms": median_ms(lambda: compilable(many), 5),
        "compile_400_tools_ms": median_ms(lambda: vocabulary.form(FormKey(many, (), (), ())), 5),
    }


def beside_compiling(bench: Bench, rounds: int) -> dict[str, Any]:
    """The longest gap of one stream, in turns while nothing and while 400 tools are compiled."""
    stream = bench.add()
    bench.until_running(1)
    alone, beside = [], []
    for number in range(rounds):
        alone.append(max(bench.step() for _ in range(30)))
        seed = {"title": f"{number}"}  # so that it is compiled anew
        asked = bench.add(schema_grammar({**tools(400), **seed}))
        gaps: list[float] = []
        while bench.core.scheduler.requests[asked].form is None:
            gaps.append(bench.step())
        gaps += [bench.step() for _ in range(max(30 - len(gaps), 1))]
        bench.core.abort([asked])
        beside.append(max(gaps[: max(len(gaps) - 1, 1)]))
    bench.core.abort([stream])
    return {
        "alone_ms": 1e3 * statistics.median(alone),
        "beside_ms": 1e3 * statistics.median(beside),
        "more_ms": 1e3 * statistics.median(b - a for a, b in zip(alone, beside, strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-160m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    tokenizer = Tokenizer.load(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[args.model], vocab_size=tokenizer.num_token_ids, max_position_embeddings=2048)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        bench = Bench(Path(folder), tokenizer)
        result = {
            "machine": machine(),
            "model": args.model,
            "vocabulary": tokenizer.num_token_ids,
            "first_schema": first_schema(bench),
            "per_token": per_token(bench, args.rounds),
            "beside_compiling": beside_compiling(bench, args.rounds),
        }
        bench.core.close()
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
