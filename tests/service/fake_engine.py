"""An engine whose output can be worked out by hand, behind the real client. Nothing is computed; nothing takes time.

Each sequence says its prompt back, again and again, one token a step, until it has `max_tokens`. What else it shall say
goes into `scripts`. Blocks are counted as a real engine would, so that a leak shows.
"""

import asyncio
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from loraplex_adapters.errors import INVALID
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_engine.link.client import EngineClient, Running
from loraplex_engine.link.messages import (
    Abort,
    AdapterFacts,
    AdaptersChanged,
    AdapterStatus,
    AddRequest,
    Device,
    EngineLimits,
    EngineStats,
    Ping,
    Pong,
    RequestOutput,
    StepOutput,
    ToEngine,
    TokenLogprobs,
    WantAdapter,
)
from loraplex_engine.link.pooling import ClassifierFacts, PoolingMethod
from loraplex_engine.link.sampling_params import FinishReason, SamplingParams
from tests.waits import MOST_SECONDS

LIMITS = EngineLimits(
    architecture="FakeForCausalLM",
    dtype="float32",
    quantization="",
    vocab_size=258,
    max_model_len=128,
    max_adapter_rank=64,
    max_num_seqs=4,
    total_blocks=64,
    block_size=16,
    weight_bytes=1,
    kv_cache_bytes=1,
    kernel_backend="none",
    device=Device("cpu", "none", 1 << 30),
    hidden_size=16,
)


@dataclass
class Accepted:
    """A request that the engine has accepted."""

    request: AddRequest
    output: list[int] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return math.ceil((len(self.request.prompt_token_ids) + len(self.output)) / LIMITS.block_size)


class FakeEngine:
    """Steps whenever it has work and `steps_allowed` is above zero; math.inf by default."""

    def __init__(self, limits: EngineLimits = LIMITS) -> None:
        self.limits = limits
        self.client = EngineClient(self.receive)
        self.received: list[ToEngine] = []
        self.requests: list[AddRequest] = []
        self.aborted: list[int] = []
        self.sequences: dict[int, Accepted] = {}
        self.scripts: list[Sequence[int]] = []  # what the next requests say instead of their prompt, in turn
        self.errors: list[str] = []  # with what the next requests fail in their first step
        self.error_reason = ""  # of those errors
        self.tokens_per_step = 1
        self.most_found = 16  # outputs of a search
        self.drafts_per_step = (0, 0)  # of each sequence: how many are checked, and how many are right
        self.steps_allowed: float = math.inf
        self.cached_tokens = 0
        self.adapters: dict[AdapterKey, AdapterFacts] = {}
        self.tiers: dict[AdapterKey, Residency] = {}
        self.pinned: set[AdapterKey] = set()
        self.rejected_adapters: dict[str, list[str]] = {}  # problems, by path
        self.whole_adapters: dict[str, str] = {}  # why they cannot be composed, by path
        self.heads: dict[str, ClassifierFacts] = {}  # of adapters, by path
        self.loads_allowed = True  # else loads wait until `allow_loads`
        self._waiting_wishes: list[WantAdapter] = []
        self._script_of: dict[int, Sequence[int]] = {}
        self._error_of: dict[int, str] = {}
        self._changed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    # ---- what a test looks at and turns ------------------------------------------------------------------------------

    @property
    def used_blocks(self) -> int:
        return sum(sequence.num_blocks for sequence in self.sequences.values())

    def forget(self) -> None:
        """What it was sent: it adds up over thousands of requests, and the collector looks at all of it."""
        self.received.clear()
        self.requests.clear()

    def allow_steps(self, count: float) -> None:
        self.steps_allowed += count
        self._changed.set()

    def allow_loads(self) -> None:
        self.loads_allowed = True
        for wish in self._waiting_wishes:
            self._place(wish)
        self._waiting_wishes.clear()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the engine holds."""
        async with asyncio.timeout(MOST_SECONDS):
            while not condition():  # noqa: ASYNC110 - there is no one event for all conditions
                await asyncio.sleep(0)

    async def until_idle(self) -> None:
        await self.until(lambda: not self.sequences)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # ---- the engine --------------------------------------------------------------------------------------------------

    def receive(self, message: ToEngine) -> None:
        self.received.append(message)
        match message:
            case AddRequest():
                self.requests.append(message)
                self._script_of[message.request_id] = self.scripts.pop(0) if self.scripts else message.prompt_token_ids
                if self.errors:
                    self._error_of[message.request_id] = self.errors.pop(0)
                self.sequences[message.request_id] = Accepted(message)
            case Abort(request_ids=request_ids):
                self.aborted += request_ids
                for request_id in request_ids:
                    self.sequences.pop(request_id, None)
            case WantAdapter(least=least):
                if self.loads_allowed or least is Residency.DISK:
                    self._place(message)
                else:
                    self._waiting_wishes.append(message)
            case Ping(nonce=nonce):
                self._deliver(Pong(nonce, self._stats()))
        self._changed.set()

    def step(self) -> None:
        """One step: every sequence gets its next tokens."""
        outputs = [each for sequence in list(self.sequences.values()) for each in self._outputs(sequence)]
        for output in outputs:
            if output.finish_reason is not None:
                self.sequences.pop(output.request_id, None)
        self.client.deliver(StepOutput(outputs, self._stats()))

    async def _run(self) -> None:
        while True:
            if self.sequences and self.steps_allowed > 0:
                self.steps_allowed -= 1
                self.step()
                await asyncio.sleep(0)
            else:
                self._changed.clear()
                await self._changed.wait()

    def _outputs(self, sequence: Accepted) -> list[RequestOutput]:
        """One output. A search says what it took until it ends; of its outputs each has a token less than the last."""
        output, beams = self._advance(sequence), sequence.request.beams
        if beams is None or output.error:
            return [output]
        taken = msgspec.structs.replace(output, token_ids=[], finish_reason=None, num_searched=beams.width)
        if output.finish_reason is None:
            return [taken]
        sampling, found = sequence.request.sampling, list[RequestOutput]()
        for place, one in enumerate(beams.output_ids[: self.most_found]):
            tokens = sequence.output[place:]
            told = [_logprobs(token, sampling.num_logprobs or 0, sampling) for token in tokens]
            logprobs = None if sampling.num_logprobs is None else told
            each = msgspec.structs.replace(output, request_id=one, token_ids=tokens, logprobs=logprobs)
            found.append(msgspec.structs.replace(each, score=-float(place)))
        nothing = [
            RequestOutput(one, [], FinishReason.MAX_TOKENS, score=-math.inf)
            for one in beams.output_ids[self.most_found :]
        ]
        return [taken, *found, *nothing]

    def _advance(self, sequence: Accepted) -> RequestOutput:
        request, sampling = sequence.request, sequence.request.sampling
        first = not sequence.output
        if request.request_id in self._error_of:
            error = self._error_of.pop(request.request_id)
            return RequestOutput(
                request.request_id, [], FinishReason.ERROR, error=error, error_reason=self.error_reason
            )
        token_ids: list[int] = []
        reason, stop_token_id = (None if sampling.max_tokens else FinishReason.MAX_TOKENS), None
        script = self._script_of[request.request_id]
        while reason is None and len(token_ids) < self.tokens_per_step:
            token_id = script[len(sequence.output) % len(script)]
            token_ids.append(token_id)
            sequence.output.append(token_id)
            if len(sequence.output) < sampling.min_tokens:
                continue
            if token_id in sampling.eos_token_ids:
                reason, stop_token_id = FinishReason.EOS, token_id
            elif token_id in sampling.stop_token_ids:
                reason, stop_token_id = FinishReason.STOP, token_id
            elif len(sequence.output) >= sampling.max_tokens:
                reason = FinishReason.MAX_TOKENS
        return RequestOutput(
            request_id=request.request_id,
            token_ids=token_ids,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            logprobs=[_logprobs(token_id, sampling.num_logprobs, sampling) for token_id in token_ids]
            if sampling.num_logprobs is not None
            else None,
            prompt_logprobs=_prompt_logprobs(request) if first and sampling.num_prompt_logprobs is not None else None,
            num_drafts=self.drafts_per_step[0],
            num_accepted_drafts=self.drafts_per_step[1],
            num_cached_tokens=self.cached_tokens if first else 0,
            pooled=self._pooled(request),
            queue_seconds=0.25 if first else 0.0,
        )

    def _pooled(self, request: AddRequest) -> bytes:
        """The vector of a prompt is its token ids; a token's logits are its id minus 97, and less by 1 a label."""
        if request.pooling is None:
            return b""
        tokens = request.prompt_token_ids
        if not request.pooling.classify:
            return array("f", tokens).tobytes()
        facts = None if request.adapter is None else self.adapters.get(request.adapter)  # there are none of sums
        head = self.limits.classifier if facts is None or facts.classifier is None else facts.classifier
        assert head is not None
        labels = range(head.num_labels)
        rows = tokens if request.pooling.method is PoolingMethod.EACH else tokens[-1:]
        return array("f", [token - 97 - label for token in rows for label in labels]).tobytes()

    def _place(self, wish: WantAdapter) -> None:
        key, problems = wish.key, self.rejected_adapters.get(wish.path, [])
        (self.pinned.add if wish.pinned else self.pinned.discard)(key)
        if wish.most is Residency.DISK:
            self.adapters.pop(key, None)
        elif wish.path and not problems:
            self.adapters[key] = AdapterFacts(
                8, 1024, ["q_proj"], [], self.whole_adapters.get(wish.path, ""), self.heads.get(wish.path)
            )
        if not problems:
            least = Residency.DEVICE if wish.pinned else wish.least
            self.tiers[key] = min(max(self.tiers.get(key, Residency.DISK), least), wish.most)
        self.say(key, wish.order, problems, INVALID if problems else "")

    def say(self, key: AdapterKey, order: int, problems: Sequence[str] = (), reason: str = "") -> None:
        """Say how an adapter stands."""
        tier, facts = self.tiers.get(key, Residency.DISK), self.adapters.get(key)
        status = AdapterStatus(key, order, tier, key in self.pinned, facts, list(problems), reason)
        self._deliver(AdaptersChanged([status]))

    def _deliver(self, message: Running) -> None:
        """Like a real engine, not before the sender has gone on."""
        asyncio.get_running_loop().call_soon(self.client.deliver, message)

    def _stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.sequences),
            num_waiting=0,
            num_waiting_for_adapter=0,
            total_blocks=self.limits.total_blocks,
            free_blocks=self.limits.total_blocks - self.used_blocks,
            cached_blocks=0,
            block_size=self.limits.block_size,
            num_steps=0,
            num_preemptions=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prompt_tokens=0,
            generated_tokens=0,
            adapter_device_bytes=0,
            adapter_host_bytes=0,
        )


def _logprobs(token_id: int, count: int, sampling: SamplingParams) -> TokenLogprobs:
    """Token t has log-probability -t/256 and rank 1; the likeliest tokens are 0, 1, 2, …"""
    top = list(range(count))
    tops, named = ([-other / 256 for other in ids] for ids in (top, sampling.logprob_token_ids))
    return TokenLogprobs(token_id, -token_id / 256, 1, top, tops, named)


def _prompt_logprobs(request: AddRequest) -> list[TokenLogprobs | None]:
    sampling = request.sampling
    start, count = sampling.prompt_logprobs_from, sampling.num_prompt_logprobs or 0
    known = [_logprobs(token_id, count, sampling) for token_id in request.prompt_token_ids[max(start, 1) :]]
    return [*known] if start else [None, *known]
