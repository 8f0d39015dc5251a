"""The engine without a process around it: add requests, take steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from loraplex_adapters.errors import COLD
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.residency import Residency
from loraplex_adapters.runtime.mirror import NO_MIRROR
from loraplex_adapters.runtime.pool import AdapterPool
from loraplex_adapters.runtime.store import AdapterStore
from loraplex_engine.acceptance import problem_with
from loraplex_engine.adapter_tiers import AdapterTiers
from loraplex_engine.cache_tiers import CacheTiers
from loraplex_engine.checkpoint.hub import resolve_model
from loraplex_engine.drafting.costs import measured
from loraplex_engine.drafting.drafting import Drafting
from loraplex_engine.drafting.model import ModelDrafts
from loraplex_engine.drafting.source import Ngrams, Source
from loraplex_engine.execution.bad_words import TokenTexts
from loraplex_engine.execution.device import chosen
from loraplex_engine.execution.disk_cache import disk_cache
from loraplex_engine.execution.loading import check_divisible, load_runner, load_runners
from loraplex_engine.execution.model_runner import ModelRunner
from loraplex_engine.execution.size_report import size_report
from loraplex_engine.following.leader import Leader
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.drafts import DraftKind
from loraplex_engine.link.load_report import UNREPORTED, LoadReport
from loraplex_engine.link.machines import Meeting
from loraplex_engine.link.messages import (
    AddRequest,
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
from loraplex_engine.ranks.group import RanksLostError
from loraplex_engine.scheduling.adapters import AdapterPreparer
from loraplex_engine.scheduling.block_manager import BlockManager
from loraplex_engine.scheduling.forms import FormPreparer
from loraplex_engine.scheduling.host_blocks import Disk, HostBlocks
from loraplex_engine.scheduling.request import Request, RequestState
from loraplex_engine.scheduling.scheduler import Scheduler
from loraplex_engine.scheduling.step import PendingResult, StepPlan, StepResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Of one core, of adapter loads while requests run that somebody waits for. Beside a load at a share of 0.1 the mean
# decoding step took 9.4 instead of 9.0 ms, and 10.0 instead of 9.2 ms without a limit (llama-160m, 2 cores): a larger
# share costs each step more, and fewer of them. On a GPU a step needs few of the cores.
CPU_LOAD_SHARE = 0.25

NOT_FINITE = "its logits are not finite numbers (NaN or infinite)"

NOTHING_PLANNED = StepPlan(())
NOTHING_COMPUTED = StepResult((), {})
COMPUTED_NOTHING = PendingResult(lambda: NOTHING_COMPUTED)


class EngineCore:
    """Turns waiting requests into tokens, one step at a time. Knows no process, no socket, no policy.

    All methods are called from one thread. `step` never waits for a file: adapters are read by the store's own threads.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: AdapterStore,
        pool: AdapterPool,
        config: EngineConfig,
        beside: ModelRunner | None = None,
        run_ahead: bool = False,
        disk: Disk | None = None,
        leader: Leader | None = None,
    ) -> None:
        """`beside`: the small model that drafts, if there is one. `disk`: the last tier of the prefix cache, likewise.

        `run_ahead`: start a step before the tokens of the one before are read. With drafts there is no such step.
        """
        self.runner = runner
        self.store = store
        self.pool = pool
        memory = runner.host_cache
        host = None if memory is None else HostBlocks(memory.num_slots, disk)
        self.blocks = BlockManager(runner.num_blocks, config.block_size, config.enable_prefix_caching, host)
        self.tiers = None if memory is None or host is None else CacheTiers(memory, host, self.blocks)
        self.limits = (
            runner.limits(config) if beside is None else _with_memory_of(beside, config, runner.limits(config))
        )
        self.forms = FormPreparer(self.limits.vocab_size, TokenTexts)
        self.scheduler = Scheduler(
            self.blocks,
            [
                AdapterPreparer(pool, self.limits.classifier is not None),
                self.forms,
                *([self.tiers.prefixes] if self.tiers else []),
            ],
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=runner.max_model_len,
            clock=time.monotonic,
            drafter=_drafting(runner, beside, self.blocks, config),
        )
        self.leader = leader
        self._run_ahead = run_ahead and config.drafts is None
        self._unread: tuple[StepPlan, PendingResult | Exception] = NOTHING_PLANNED, COMPUTED_NOTHING
        self._num_steps = 0
        self._in_step = False  # also after a step that raised: nobody knows then what the cache holds
        self._num_arrivals = 0
        self._rejected: list[RequestOutput] = []
        self._not_finite: set[AdapterKey | None] = set()  # whose logits were NaN or infinite; None: the base model's
        self.adapters = AdapterTiers(store, pool)

    @classmethod
    def load(cls, config: EngineConfig, report: LoadReport = UNREPORTED, meeting: Meeting | None = None) -> EngineCore:
        """Load the model that `config` names. `meeting`: where its other machines come.

        Raises ValueError or OSError whose text says what the operator can do.
        """
        config.check()
        path, small = resolve_model(config.model, config.revision, report), config.drafting()
        if small is not None:
            small = msgspec.structs.replace(small, model=str(resolve_model(small.model, small.revision, report)))
        leader: Leader | None = None
        if config.world > 1:
            check_divisible(config, path)
            config = config if config.devices else msgspec.structs.replace(config, device=chosen(config.device))
            leader = Leader(config, path, report, meeting)
        try:
            return cls._loaded(config, path, small, report, leader)
        except BaseException:
            if leader is not None:
                leader.close()
            raise

    @classmethod
    def _loaded(
        cls,
        config: EngineConfig,
        path: Path,
        small: EngineConfig | None,
        report: LoadReport,
        leader: Leader | None,
    ) -> EngineCore:
        beside: ModelRunner | None = None
        if small is None:
            runner = load_runner(config, path, report, leader)
        else:
            runner, beside = load_runners(config, path, small, Path(small.model), report, leader)
        model, mirror = runner.model, leader or NO_MIRROR
        store = AdapterStore(
            targets=model.lora_targets(),
            dtype=model.dtype,
            max_rank=config.max_adapter_rank,
            budget_bytes=config.adapter_host_bytes,
            num_threads=config.adapter_loader_threads,
            pack=runner.ops.pack_lora,
            load_share=config.adapter_load_share or (CPU_LOAD_SHARE if runner.ops.device.type == "cpu" else 1.0),
            mirror=mirror,
        )
        pool = AdapterPool(
            sites=model.lora_sites(),
            store=store,
            num_slots=config.max_resident_adapters,
            budget_bytes=config.adapter_device_bytes,
            mirror=mirror,
        )
        disk = None if runner.host_cache is None else disk_cache(config, path, runner, runner.host_cache)
        run_ahead = runner.ops.device.type == "cuda" if config.run_ahead is None else config.run_ahead
        logger.info("%s", size_report([runner] if beside is None else [runner, beside], config))
        return cls(runner, store, pool, config, beside, run_ahead, disk, leader)

    def close(self) -> None:
        """Stop the threads that load adapters, compile grammars, and read and write files of the cache; and the other
        ranks."""
        self.store.close()
        if self.tiers is not None:
            self.tiers.close(keep=not self._in_step)
        self.forms.close()
        if self.leader is not None:
            self.leader.close()

    # ---- requests --------------------------------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Accept a request, or have the next step say what is wrong with it. A bad request never reaches the model."""
        problem, reason = problem_with(message, self.limits), ""
        if message.request_id in self.scheduler.requests:
            problem = f"request id {message.request_id} is in use"
        if not problem and message.adapter is not None and not self.store.is_registered(message.adapter):
            problem, reason = f"adapter {message.adapter} is not registered with this engine", COLD
        if problem:
            output = RequestOutput(message.request_id, [], FinishReason.ERROR, error=problem, error_reason=reason)
            self._rejected.append(output)
            return
        self._num_arrivals += 1
        self.scheduler.add(Request(message, self._num_arrivals, time.monotonic()))

    def set_vocabulary(self, message: SetVocabulary) -> None:
        """Take what the forms of later requests are made of. Takes up to half a second."""
        self.forms.set_vocabulary(message.token_bytes)

    def abort(self, request_ids: Iterable[int]) -> None:
        """Forget requests in whatever state they are. Their blocks are free at once; unknown ids are ignored."""
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    # ---- adapters --------------------------------------------------------------------------------------------------

    def want_adapter(self, wish: WantAdapter) -> None:
        """Note what is wanted of an adapter; later steps carry it out and say how the adapter stands."""
        if wish.most is not Residency.DEVICE:
            self._not_finite.discard(wish.key)
        self.adapters.want(wish)

    def note_upload(self, news: UploadGrew | UploadEnded) -> None:
        """Read ahead what an upload brings, in threads, or forget it."""
        if isinstance(news, UploadGrew):
            self.store.receive(news.upload, Path(news.path), news.size_bytes, news.num_bytes)
        else:
            self.store.stop_receiving(news.upload)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `step` would do or report anything, now or once a loader thread has finished."""
        unread = self._unread[0].scheduled
        return bool(self.scheduler.requests or unread or self._rejected or self.adapters.has_work())

    def step(self) -> list[FromEngine]:
        """Run one step: compute the requests that are ready, and return everything that happened.

        Of a step that foresees the next one, what happened is returned by the next call, which starts that first.
        """
        events: list[FromEngine] = []
        self._in_step = True
        self._check_ranks()
        self.adapters.advance(self.scheduler.adapter_users)
        if self.tiers is not None:
            self.tiers.prefixes.poll()
        plan = self.scheduler.schedule()
        if self.tiers is not None:
            self.tiers.move(idle=not plan.scheduled)
        self.store.pace.steps(running=bool(plan.scheduled))
        started = self._tried(lambda: self.runner.execute(plan), plan) if plan.scheduled else COMPUTED_NOTHING
        outputs, self._rejected = self._rejected + self._read(), []
        self._unread = plan, started
        if self._run_ahead:
            self._publish(plan)
        if self._run_ahead and plan.is_foreseeable and isinstance(started, PendingResult):
            plan.foresee(self.runner.max_model_len)
        else:
            outputs += self._read()
        self.store.pace.steps(running=bool(self.scheduler.running))
        if plan.scheduled or outputs:
            self._num_steps += 1
            events.append(StepOutput(outputs, self.stats()))
        events += self.adapters.changed()
        self._in_step = False
        return events

    def _check_ranks(self) -> None:
        """Raise RanksLostError if another rank has ended: a load that waits for it would never end."""
        if self.leader is not None:
            self.leader.check()

    def _tried(self, part: Callable[[], T], plan: StepPlan) -> T | Exception:
        """What a part of a step comes to, or why it could not be computed.

        An error of the device itself is raised, and one of other ranks: nothing there can be trusted any more.
        """
        try:
            return part()
        except (torch.AcceleratorError, RanksLostError):
            raise
        except Exception as error:
            ids = [item.request.request_id for item in plan.scheduled]
            logger.exception("step %d failed; its requests end with an error: %s", self._num_steps, ids)
            return error

    def _publish(self, plan: StepPlan) -> None:
        """Let others find the blocks that a started step fills with tokens that were not read when it was planned."""
        for item in plan.scheduled:
            if item.request.block_ids:  # else it has ended meanwhile
                self.blocks.publish(item.request, item.num_computed_tokens + item.num_new_tokens)

    def _read(self) -> list[RequestOutput]:
        """Wait for the step that was not read yet, and take in what it computed. One that failed has its requests fail,
        and only they.
        """
        (plan, started), self._unread = self._unread, (NOTHING_PLANNED, COMPUTED_NOTHING)
        result = self._tried(started.result, plan) if isinstance(started, PendingResult) else started
        plan.recall()
        if isinstance(result, Exception):
            self.scheduler.fail_step(plan, f"the engine could not compute this step: {result}")
            return self.scheduler.update(NOTHING_PLANNED, NOTHING_COMPUTED)
        if result.problems:
            self.scheduler.fail_formless(_running(plan), result.problems)
        if result.not_finite:
            self._fail_not_finite(_running(plan), result.not_finite)
        return self.scheduler.update(plan, result)

    def _fail_not_finite(self, requests: Sequence[Request], request_ids: frozenset[int]) -> None:
        """End the requests with these ids; the log names their model or adapter once."""
        failed = [request for request in requests if request.request_id in request_ids]
        users = {member for request in failed for member in (request.adapter.members if request.adapter else (None,))}
        for user in users - self._not_finite:
            who = "the base model" if user is None else f"adapter {user}"
            logger.error("%s: %s; each of its requests that meets it ends so, and this is said once", who, NOT_FINITE)
        self._not_finite |= users
        self.scheduler.fail_not_finite(failed, NOT_FINITE)

    def beat(self) -> EngineStats:
        """The numbers of now, once all other ranks have answered.

        Raises RanksLostError if one has ended; waits for one that stands still, so that the service gives up on all.
        """
        self._check_ranks()
        if self.leader is not None:
            self.leader.beat()
        return self.stats()

    def stats(self) -> EngineStats:
        """The numbers of now. Raises RanksLostError if another rank has ended."""
        self._check_ranks()
        scheduler, blocks = self.scheduler, self.blocks
        adapters, *others = scheduler.rooms
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + sum(map(len, others)),
            num_waiting_for_adapter=len(adapters),
            total_blocks=blocks.num_blocks,
            free_blocks=blocks.num_free,
            cached_blocks=blocks.num_cached,
            block_size=blocks.block_size,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=blocks.prefix_queries,
            prefix_cache_hits=blocks.prefix_hits,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            adapter_device_bytes=self.pool.used_bytes,
            adapter_host_bytes=self.store.used_bytes,
            adapters=self.pool.in_use(),
            num_not_finite=scheduler.num_not_finite,
            num_forms=self.forms.num_given,
            num_forms_compiled=self.forms.num_compiled,
            form_seconds=self.forms.compile_seconds,
            num_forms_failed=scheduler.num_forms_failed,
            draft_tokens=scheduler.draft_tokens,
            accepted_draft_tokens=scheduler.accepted_draft_tokens,
            ranks=[] if self.leader is None else self.leader.figures,
            **({} if self.tiers is None else self.tiers.stats()),
        )


def _running(plan: StepPlan) -> list[Request]:
    """The requests of a step that nothing else has ended or preempted meanwhile."""
    return [item.request for item in plan.scheduled if item.request.leader.state is RequestState.RUNNING]


def _with_memory_of(beside: ModelRunner, config: EngineConfig, limits: EngineLimits) -> EngineLimits:
    """The limits of an engine that holds a small model too."""
    small = beside.limits(config)
    return msgspec.structs.replace(
        limits,
        weight_bytes=limits.weight_bytes + small.weight_bytes,
        kv_cache_bytes=limits.kv_cache_bytes + small.kv_cache_bytes,
    )


def _drafting(
    runner: ModelRunner, beside: ModelRunner | None, blocks: BlockManager, config: EngineConfig
) -> Drafting | None:
    """What adds drafts; None: the model has none."""
    if config.drafts is None:
        return None
    sources: dict[DraftKind, Source] = {DraftKind.NGRAM: Ngrams()}
    if beside is not None:
        budget = config.max_num_batched_tokens
        costs = measured(beside, config.drafts.tokens, min(config.max_num_seqs, budget))
        sources[DraftKind.MODEL] = ModelDrafts(beside, costs, budget)
    return Drafting(
        blocks,
        sources,
        measured(runner, config.drafts.tokens, config.most_drawn),
        config.most_drawn,
        runner.max_model_len,
        time.monotonic,
    )
