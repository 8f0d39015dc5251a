"""transformers + PEFT: generate() on static batches whose rows use different adapters (PEFT's `adapter_names`)."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.worker import serve, take_stdout
from benchmarks.workload import Work
from loraplex_service.bench.records import Record


class Streamer:
    """Notes the moment of every step; generate() calls it once with the prompt first."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._seen_prompt = False

    def put(self, value: Any) -> None:
        if self._seen_prompt:
            self.moments.append(time.perf_counter())
        self._seen_prompt = True

    def end(self) -> None:
        """Part of the interface; nothing is buffered."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    answers = take_stdout()

    import torch
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        args.model / "base", dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    for index in range(args.adapters):
        path, name = args.model / "adapters" / f"a{index:02d}", f"a{index:02d}"
        if index == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    load_seconds = time.perf_counter() - started

    def generate(batch: Sequence[Work]) -> tuple[list[Record], list[list[int]]]:
        """One static batch: everybody starts together and ends together."""
        ids = torch.tensor([item.prompt for item in batch])
        sent = time.perf_counter()
        streamer = Streamer()
        names = {}
        if args.adapters:
            names = {"adapter_names": ["__base__" if w.adapter is None else f"a{w.adapter:02d}" for w in batch]}
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=batch[0].output,
                min_new_tokens=batch[0].output,
                do_sample=False,
                streamer=streamer,
                **names,
            )
        records = [Record(sent, len(w.prompt), w.output, [(m, 1) for m in streamer.moments]) for w in batch]
        return records, out[:, ids.shape[1] :].tolist()

    async def run(work: Sequence[Work], concurrency: int | None) -> tuple[list[Record], list[list[int]]]:
        if concurrency is None:
            raise ValueError("static batches take no requests that come by themselves")
        records: list[Record] = []
        tokens: list[list[int]] = []
        for start in range(0, len(work), concurrency):
            batch_records, batch_tokens = generate(work[start : start + concurrency])
            records += batch_records
            tokens += batch_tokens
        return records, tokens

    generate([Work(list(range(300, 332)), 4, None)])
    about = {"system": "transformers + PEFT", "version": transformers.__version__, "load_seconds": load_seconds}
    serve(run, about, asyncio.new_event_loop(), answers)


if __name__ == "__main__":
    main()
