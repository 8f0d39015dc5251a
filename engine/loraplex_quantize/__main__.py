"""`python -m loraplex_quantize MODEL --method … --out DIR`: a quantised copy of a model, and what it costs.

The work is done by the packages that the field trusts for it: GPTQModel for gptq and awq, bitsandbytes for nf4 and
int8. They are extras and belong in an environment of their own; serving the result needs neither.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loraplex_engine.checkpoint.hub import resolve_model
from loraplex_engine.checkpoint.model_config import ModelError
from loraplex_engine.checkpoint.weights import read_json, shard_paths
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import AddRequest, StepOutput
from loraplex_engine.link.sampling_params import SamplingParams
from loraplex_engine.models.registry import read_model_config
from loraplex_engine.quantization.detection import read_spec

EXTRAS = {"gptq": "quantize", "awq": "quantize", "nf4": "bitsandbytes", "int8": "bitsandbytes"}
PACKAGES = {"quantize": "gptqmodel", "bitsandbytes": "bitsandbytes"}
WINDOW = 512  # tokens of one calibration sample, and of one stretch of text whose perplexity is measured
SCRIPT = Path(__file__).with_name("packages.py")
# What makes the copy a whole model, and the packages do not all write.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of `loraplex quantize`."""

    model: str  # a directory, or a hub id
    method: str  # of EXTRAS
    out: Path  # a new directory
    calibration: Path | None  # text; gptq and awq need it
    text: Path | None  # whose perplexity is measured before and after
    group_size: int  # of gptq and awq: input features that share a scale
    samples: int  # of gptq and awq: stretches of calibration text that are used, from its start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="loraplex quantize", description="Write a quantised copy of a model.")
    parser.add_argument("model", help="a directory, or a hub id")
    parser.add_argument("--method", choices=list(EXTRAS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    try:
        quantize(Job(**vars(parser.parse_args(arguments))))
    except (ModelError, OSError) as error:
        sys.exit(f"Error: {error}")


def quantize(job: Job) -> None:
    """Write the copy, and print its size and the perplexity before and after.

    Raises ModelError saying what is missing: the package, the calibration text, a new directory.
    """
    source = resolve_model(job.model)
    if source.is_file():
        raise ModelError(f"{source}: is a GGUF file: start from the model in Hugging Face layout that it was made of")
    spec = read_spec(source, read_json(source / "config.json"))
    if spec is not None:
        raise ModelError(f"{source}: is quantised already ({spec.label}): start from the unquantised model")
    if job.out.exists():
        raise ModelError(f"{job.out}: exists; name a directory that does not")
    _require(job)
    # Both the copy and its source are measured by the engine that serves them.
    before = None if job.text is None else perplexity(source, source, job.text)
    _run_package(source, job)
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        if not (job.out / path.name).exists():
            shutil.copyfile(path, job.out / path.name)
    after = None if job.text is None else perplexity(job.out, source, job.text)
    _report(source, job.out, before, after)


def perplexity(directory: Path, tokenizer: Path, text: Path) -> float:
    """exp of the mean negative log-likelihood of the text's tokens, in stretches of WINDOW that start afresh."""
    core = EngineCore.load(EngineConfig(model=str(directory), max_num_seqs=4))
    sampling = SamplingParams(seed=0, max_tokens=1, temperature=0.0, num_prompt_logprobs=0)
    windows = _windows(tokenizer, text, core.limits.max_model_len - 1)
    for request_id, token_ids in enumerate(windows):
        core.add(AddRequest(request_id, token_ids, sampling))
    total, count = 0.0, 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task(f"perplexity of {directory.name}", total=sum(map(len, windows)) - len(windows))
        while core.has_work():
            messages = [message for message in core.step() if isinstance(message, StepOutput)]
            for output in [part for message in messages for part in message.outputs]:
                if output.error:
                    raise ModelError(f"{directory}: {output.error}")
                found = [details.logprob for details in output.prompt_logprobs or () if details is not None]
                total, count = total - sum(found), count + len(found)
            progress.update(shown, completed=count)
    core.close()
    return math.exp(total / count)


def _windows(tokenizer: Path, text: Path, longest: int) -> list[list[int]]:
    """The text's tokens in stretches of WINDOW; a short rest is left out, unless it is all there is."""
    tokenize = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tokenizer)
    token_ids: list[int] = tokenize(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    size = min(WINDOW, longest)
    windows = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
    windows = windows[:1] + [window for window in windows[1:] if len(window) == size]
    if not windows or len(windows[0]) < 2:
        raise ModelError(f"{text}: holds no text")
    return windows


def _require(job: Job) -> None:
    extra = EXTRAS[job.method]
    for package in (PACKAGES[extra], "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"{job.method} is done by {package}, which is not installed: install 'loraplex-server[{extra}]', best "
                "in an environment of its own"
            )
    if extra == "quantize" and job.calibration is None:
        raise ModelError(f"{job.method} needs --calibration: a file with text like what the model will be given")


def _run_package(source: Path, job: Job) -> None:
    """Run the package in a process of its own, which it may change as it likes, and whose files go with its folder."""
    calibration = []
    if EXTRAS[job.method] == "quantize" and job.calibration is not None:
        longest = read_model_config(source).max_position_embeddings
        calibration = _windows(source, job.calibration, longest)[: job.samples]
    asked = {"method": job.method, "group_size": job.group_size, "calibration": calibration}
    with tempfile.TemporaryDirectory() as folder:  # GPTQModel leaves a directory of logs where it is run
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT)],
            input=json.dumps({"source": str(source.resolve()), "out": str(job.out.resolve()), **asked}),
            cwd=folder,
            text=True,
        )
    if done.returncode:
        raise ModelError(f"{PACKAGES[EXTRAS[job.method]]} failed with status {done.returncode}: see its messages above")


def _report(source: Path, out: Path, before: float | None, after: float | None) -> None:
    sizes = [sum(path.stat().st_size for path in shard_paths(directory)) for directory in (source, out)]
    table = Table("", "before", "after", "ratio")
    table.add_row("weights, MB", *(f"{size / 1e6:.2f}" for size in sizes), f"{sizes[1] / sizes[0]:.3f}")
    if before is not None and after is not None:
        table.add_row("perplexity", f"{before:.3f}", f"{after:.3f}", f"{after / before:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
