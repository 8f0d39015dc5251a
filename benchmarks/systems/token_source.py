"""An engine process that computes nothing: every step gives each sequence one token, so many steps a second.

    python -m benchmarks.systems.token_source --bus ADDRESS --steps-per-second N

It stands where `python -m loraplex_engine` would, so that what is measured is the service alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks.workload import FIRST_TOKEN_ID, VOCAB
from loraplex_engine.link.bus import EngineBus
from loraplex_engine.link.messages import (
    AddRequest,
    Device,
    EngineLimits,
    EngineStats,
    FromEngine,
    RequestOutput,
    SetVocabulary,
    StepOutput,
    UploadEnded,
    UploadGrew,
    WantAdapter,
)
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_engine.process import run_engine

MAX_SEQUENCES = 4096
LIMITS = EngineLimits(
    architecture="None",
    dtype="none",
    quantization="",
    vocab_size=VOCAB,
    max_model_len=65536,
    max_adapter_rank=1,
    max_num_seqs=MAX_SEQUENCES,
    total_blocks=MAX_SEQUENCES * 4096,
    block_size=16,
    weight_bytes=0,
    kv_cache_bytes=0,
    kernel_backend="none",
    device=Device("cpu", "none", 1 << 30),
)


class TokenSource:
    """What `loraplex_engine.process` needs of a core. Steps begin on a fixed clock; one that is late is made up for."""

    limits = LIMITS

    def __init__(self, steps_per_second: float) -> None:
        self._seconds = 1 / steps_per_second
        self._next_step = 0.0
        self._left: dict[int, int] = {}  # by request id: tokens still to come
        self._num_steps = 0

    def add(self, message: AddRequest) -> None:
        if not self._left:
            self._next_step = time.perf_counter()
        self._left[message.request_id] = message.sampling.max_tokens

    def set_vocabulary(self, message: SetVocabulary) -> None:
        pass

    def abort(self, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def want_adapter(self, wish: WantAdapter) -> None:
        raise ValueError("a token source has no adapters")

    def note_upload(self, news: UploadGrew | UploadEnded) -> None:
        """Without adapters there is nothing to read ahead."""

    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[FromEngine]:
        time.sleep(max(0.0, self._next_step - time.perf_counter()))
        self._next_step += self._seconds
        self._num_steps += 1
        token_id = FIRST_TOKEN_ID + self._num_steps % (VOCAB - FIRST_TOKEN_ID)
        outputs = [self._advance(request_id, token_id) for request_id in list(self._left)]
        return [StepOutput(outputs, self.stats())]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._left),
            num_waiting=0,
            num_waiting_for_adapter=0,
            total_blocks=LIMITS.total_blocks,
            free_blocks=LIMITS.total_blocks,
            cached_blocks=0,
            block_size=LIMITS.block_size,
            num_steps=self._num_steps,
            num_preemptions=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prompt_tokens=0,
            generated_tokens=0,
            adapter_device_bytes=0,
            adapter_host_bytes=0,
        )

    def beat(self) -> EngineStats:
        return self.stats()

    def close(self) -> None:
        pass

    def _advance(self, request_id: int, token_id: int) -> RequestOutput:
        self._left[request_id] -= 1
        if self._left[request_id]:
            return RequestOutput(request_id, [token_id])
        del self._left[request_id]
        return RequestOutput(request_id, [token_id], FinishReason.MAX_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bus", required=True)
    parser.add_argument("--steps-per-second", type=float, required=True)
    args = parser.parse_args()
    with EngineBus(args.bus) as bus:
        sys.exit(run_engine(lambda report: TokenSource(args.steps_per_second), bus))


if __name__ == "__main__":
    main()
