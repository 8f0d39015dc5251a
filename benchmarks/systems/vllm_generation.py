"""vLLM's engine in a process and an environment of its own, driven step by step, for `benchmarks.generation`.

The file is both ends: `Vllm` starts it with the other environment's Python. There it needs the standard library and
vLLM alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self


class Vllm:
    """A vLLM engine, which runs the requests that it is given."""

    def __init__(self, python: Path, model: Path, threads: int, drafts: int = 0) -> None:
        """`drafts`: tokens of a step that n-grams of the text propose; 0: none."""
        options = ["--model", model, "--threads", threads, "--drafts", drafts]
        self._process = subprocess.Popen(
            [str(each) for each in (python, __file__, *options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"LD_PRELOAD": os.environ.get("VLLM_PRELOAD", "")},
            text=True,
        )
        self.name = f"vLLM {self._answer()['version']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def run(self, works: Sequence[Mapping[str, Any]], tokens: int) -> float:
        """Run requests to their ends. Returns their tokens per second, from the moment when each had its first."""
        assert self._process.stdin is not None
        print(json.dumps({"works": works, "tokens": tokens}), file=self._process.stdin, flush=True)
        return float(self._answer()["tokens_per_second"])

    def _answer(self) -> dict[str, Any]:
        """Raises RuntimeError when the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with {self._process.wait()}; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# ---- in the other environment ----------------------------------------------------------------------------------------


def _params(work: Mapping[str, Any], tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    form = None
    if work["schema"] is not None:
        form = StructuredOutputsParams(json=work["schema"])
    elif work["choice"]:
        form = StructuredOutputsParams(choice=[work["choice"]])
    return SamplingParams(
        temperature=work["temperature"],
        seed=work["seed"],
        max_tokens=tokens,
        allowed_token_ids=list(work["allowed"]) or None,
        detokenize=False,
        structured_outputs=form,
    )


def _run(engine: Any, works: Sequence[Mapping[str, Any]], tokens: int) -> float:
    for number, work in enumerate(works):
        engine.add_request(str(number), {"prompt_token_ids": work["prompt"]}, _params(work, tokens))
    counts: dict[str, int] = {}
    began = num_first = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        if began is None and len(counts) == len(works):
            began, num_first = time.perf_counter(), sum(counts.values())
    assert began is not None
    assert num_first is not None
    return (sum(counts.values()) - num_first) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--drafts", type=int, default=0)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever its libraries print
    # Without these vLLM keeps a core for itself and computes on the others.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import vllm

    options: dict[str, Any] = {}
    if args.drafts:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": args.drafts,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    engine = vllm.LLM(
        model=args.model,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
        seed=0,
        **options,
    ).llm_engine
    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rate = _run(engine, request["works"], request["tokens"])
        print(json.dumps({"tokens_per_second": rate}), file=answers, flush=True)


if __name__ == "__main__":
    main()
