"""What a rounded key-value cache costs in quality: perplexity and log-probabilities of a text under each cache type.

    python -m benchmarks.kv_cache MODEL TEXT [--kernels reference] [--dtype float32] [--window 512] [--windows 16]

MODEL is a directory with a tokenizer.json, TEXT a file. The text is cut into windows, each read as one prompt in steps
of --step tokens: every token's prediction attends to keys and values that were stored and read again. The cache of the
model's own type is what the others are compared with.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import KV_CACHE_DTYPES, EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput, TokenLogprobs
from loraplex_engine.link.sampling_params import SamplingParams


@dataclass(frozen=True)
class Reading:
    """What an engine thinks of the text."""

    token_bytes: int  # of cache
    predictions: list[TokenLogprobs]  # of every token but the first of each window

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(each.logprob for each in self.predictions) / len(self.predictions))

    def against(self, other: Reading) -> tuple[list[float], float]:
        """How far the text's log-probabilities are from another's, and how often both have the same best token."""
        pairs = list(zip(self.predictions, other.predictions, strict=True))
        errors = [abs(mine.logprob - theirs.logprob) for mine, theirs in pairs]
        return errors, sum(mine.top_ids[0] == theirs.top_ids[0] for mine, theirs in pairs) / len(pairs)


def cut(model: Path, text: Path, window: int = 512, windows: int = 16) -> list[list[int]]:
    """The text's tokens in stretches of `window`, as many as are whole, and at most `windows`."""
    tokens = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).encode(text.read_text()).ids
    found = [tokens[at : at + window] for at in range(0, len(tokens) - window + 1, window)]
    if not found:
        raise SystemExit(f"{text} has {len(tokens)} tokens, fewer than a window of {window}")
    return found[:windows]


def read(config: EngineConfig, windows: list[list[int]]) -> Reading:
    core = EngineCore.load(config)
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=1, num_prompt_logprobs=1)
    for index, window in enumerate(windows):
        core.add(AddRequest(index, window, sampling, None))
    predictions: dict[int, list[TokenLogprobs]] = {}
    while core.has_work():
        for message in core.step():
            for output in message.outputs if isinstance(message, StepOutput) else ():
                found = [each for each in output.prompt_logprobs or () if each is not None]
                predictions.setdefault(output.request_id, []).extend(found)
    limits = core.limits
    core.close()
    in_order = [each for index in range(len(windows)) for each in predictions[index]]
    return Reading(limits.kv_cache_bytes // (limits.total_blocks * limits.block_size), in_order)


def as_markdown(readings: dict[str, Reading]) -> str:
    lines = [
        "| cache | bytes a token | perplexity | mean log-probability error | largest | same best token |",
        "|---|---|---|---|---|---|",
    ]
    for name, reading in readings.items():
        errors, same = reading.against(readings["auto"])
        lines.append(
            f"| {name} | {reading.token_bytes} | {reading.perplexity:.4f} | {sum(errors) / len(errors):.2e} "
            f"| {max(errors):.2e} | {same:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--window", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--windows", type=int, default=16, help="prompts at most")
    parser.add_argument("--step", type=int, default=128, help="tokens computed at once")
    args = parser.parse_args()
    windows = cut(args.model, args.text, args.window, args.windows)
    readings = {}
    for name in KV_CACHE_DTYPES:
        config = EngineConfig(
            model=str(args.model),
            kernels=args.kernels,
            dtype=args.dtype,
            kv_cache_dtype=name,
            max_num_batched_tokens=args.step,
            max_model_len=args.window + 16,
            max_num_seqs=4,
        )
        readings[name] = read(config, windows)
    print(as_markdown(readings))


if __name__ == "__main__":
    main()
