"""The base models that the operator configured: each with its engine, its tokenizer and its defaults."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraplex.v1.generation_pb2 import Sampling
from loraplex_adapters.files.gguf import hub_parts, parts_of
from loraplex_engine.link.client import EngineClient
from loraplex_service.errors import FailedPrecondition, LoraplexError, NotFound, Unavailable
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.generation_defaults import default_sampling, unread
from loraplex_service.models.supervisor import EngineState, EngineSupervisor
from loraplex_service.names.target import LoadedModel, merged_sampling
from loraplex_service.text import TextError, Tokenizer

logger = logging.getLogger(__name__)

IDLE_POLL_SECONDS = 0.05
LOADING_RETRY_SECONDS = 5.0
REVISED = (".safetensors", ".json")  # the files of a model directory that another revision may change

Supervise = Callable[[HostedModelConfig, Callable[[], None]], EngineSupervisor]  # the callback hears of every change


class HostedModel:
    """One model, through all restarts of its engine. For one event loop."""

    def __init__(
        self, config: HostedModelConfig, supervise: Supervise, changed: Callable[["HostedModel"], None]
    ) -> None:
        self.config = config
        self.name = config.name
        self.default_sampling: Sampling = config.sampling()
        self.tokenizer: Tokenizer | None = None
        self._text_revision = ""  # that the tokenizer is of
        self.num_changes = 0  # of what can be seen here
        self.supervisor = supervise(config, self._change)
        self._changed = changed
        self._text_error = ""
        self._loading: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[None] | None = None

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        if self._loading is not None and self.supervisor.state is not EngineState.FAILED:
            return EngineState.LOADING
        return EngineState.FAILED if self._text_error else self.supervisor.state

    @property
    def error(self) -> str:
        return self._text_error or self.supervisor.error

    @property
    def revision(self) -> str:
        """The revision of the files that the engine loaded last; known once it has loaded."""
        return self.supervisor.revision

    @property
    def client(self) -> EngineClient | None:
        """The client of the running engine; None: there is none. A model that is being unloaded still has one."""
        return self.supervisor.client

    def serving(self) -> LoadedModel:
        """The snapshot for a new request.

        Raises FailedPrecondition (MODEL_UNLOADED) or Unavailable (MODEL_LOADING, …).
        """
        state, client, limits = self.state, self.client, self.supervisor.limits
        if state is EngineState.ACTIVE and client is not None and limits is not None and self.tokenizer is not None:
            sampling, literal = self.default_sampling, self.config.literal_content
            return LoadedModel(self.name, self.revision, limits, client, self.tokenizer, sampling, literal)
        raise self._not_serving(state)

    async def successor(self, revision: str) -> EngineClient:
        """Wait until the next engine after one that died serves. Raises what `serving` raises if none will.

        Also raises Unavailable (ENGINE_RESTARTING) if the next engine has another revision of the model.
        """
        await self.supervisor.wait_settled()
        if self.supervisor.state is EngineState.ACTIVE and self.revision != revision:
            message = f"model {self.name!r} was replaced: its revision was {revision}, and is {self.revision} now"
            raise Unavailable(
                "ENGINE_RESTARTING", f"{message}; the request cannot go on with another revision, send it again"
            )
        return self.serving().client

    def _not_serving(self, state: EngineState) -> LoraplexError:
        match state:
            case EngineState.LOADING:
                progress = self.supervisor.progress
                done = f", {100 * progress.bytes_loaded // progress.bytes_total} % read" if progress.bytes_total else ""
                message = f"model {self.name!r} is still loading{done}; try again soon"
                return Unavailable("MODEL_LOADING", message, LOADING_RETRY_SECONDS)
            case EngineState.RESTARTING | EngineState.ACTIVE:
                message = f"the engine of model {self.name!r} is starting again; try again soon, or another replica"
                return Unavailable("ENGINE_RESTARTING", message, LOADING_RETRY_SECONDS)
            case EngineState.FAILED:
                message = f"model {self.name!r} could not be loaded; its state says why (GetModel)"
            case EngineState.UNLOADING:
                message = f"model {self.name!r} is being unloaded"
            case EngineState.UNLOADED:
                message = f"model {self.name!r} is not loaded; load it first (LoadModel)"
        return FailedPrecondition("MODEL_UNLOADED", message)

    # ---- changes -----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Begin to load, unless that has begun already. Raises FailedPrecondition while it is being unloaded."""
        if self._unloading is not None:
            message = f"model {self.name!r} is being unloaded; load it again once it is gone"
            raise FailedPrecondition("MODEL_UNLOADED", message)
        if self._loading is None and self.state in (EngineState.UNLOADED, EngineState.FAILED):
            self._text_error = ""
            self._loading = asyncio.create_task(self._load(), name=f"load {self.name}")

    def unload(self, grace_seconds: float) -> None:
        """Begin to unload: refuse new requests, and let running ones go on for the grace.

        An unloaded model stays so.
        """
        if self._unloading is None and self.state is not EngineState.UNLOADED:
            self._unloading = asyncio.create_task(self._unload(grace_seconds), name=f"unload {self.name}")

    async def wait_settled(self) -> None:
        """Wait until the work that `load` or `unload` began has ended, well or not."""
        for task in (self._loading, self._unloading):
            if task is not None:
                await asyncio.wait({task})

    async def close(self, reason: LoraplexError) -> None:
        """End the engine now, and the requests that still run on it with `reason`."""
        if self._unloading is not None:
            self._unloading.cancel()
            await asyncio.wait({self._unloading})
        await self._stop(reason)

    async def _load(self) -> None:
        try:
            self.supervisor.start()
            if not self.config.is_local:
                await self.supervisor.wait_settled()  # the engine fetches it from the hub
            await self._read_text()
        except Exception as error:  # a model without its text must be FAILED, whatever the reason
            known = isinstance(error, TextError | OSError)
            self._text_error = str(error) if known else f"its text files: {type(error).__name__}: {error}"
            logger.error("model %s cannot be served: %s", self.name, self._text_error, exc_info=not known)
            await self.supervisor.stop(FailedPrecondition("MODEL_UNLOADED", f"model {self.name!r} cannot be served"))
        finally:
            self._loading = None
            self._change()

    async def _read_text(self) -> None:
        """Read the tokenizer of the revision that the engine has loaded. Raises TextError, OSError."""
        for _ in range(2):  # the files may be replaced between the engine's look and this one
            if self.supervisor.state is EngineState.FAILED:
                return
            tokenizer, self._text_revision = await asyncio.to_thread(_read_text_files, self.config)
            self.tokenizer = tokenizer
            self._take_defaults(tokenizer.generation_config)
            await self.supervisor.wait_settled()
            if not self._has_other_text():
                if self.supervisor.limits is not None:
                    _check_ids(tokenizer, self.default_sampling, self.supervisor.limits.vocab_size)
                await self._teach()
                return
        raise TextError("its files were replaced after its engine had loaded them; load it again")

    def _take_defaults(self, generation_config: Mapping[str, Any]) -> None:
        """Set the sampling defaults: the configuration's, and for absent fields the model's own. Raises TextError."""
        if self.config.default_sampling == "none":
            return
        own = default_sampling(generation_config)
        self.default_sampling = merged_sampling(self.config.sampling(), own)
        if missing := unread(generation_config):
            message = "model %s: generation_config.json sets %s, which this server does not have: requests go without"
            logger.warning(message, self.name, ", ".join(missing))

    async def _teach(self) -> None:
        """Give the engine its vocabulary, and wait until it has prepared it: it does nothing else meanwhile."""
        if self.client is not None and self.tokenizer is not None:
            self.client.teach(self.tokenizer.vocabulary)
            with suppress(LoraplexError):  # the engine died, of which the supervisor takes care
                await self.client.ping()

    def _has_other_text(self) -> bool:
        return self.supervisor.state is EngineState.ACTIVE and self._text_revision != self.supervisor.revision

    async def _unload(self, grace_seconds: float) -> None:
        try:
            self.supervisor.begin_unloading()
            try:
                async with asyncio.timeout(grace_seconds):
                    while self.client is not None and self.client.requests.num_unfinished:  # noqa: ASYNC110  (it has no event)
                        await asyncio.sleep(IDLE_POLL_SECONDS)
            except TimeoutError:
                logger.warning("requests still run on model %s after the grace of %g s", self.name, grace_seconds)
            await self._stop(FailedPrecondition("MODEL_UNLOADED", f"model {self.name!r} was unloaded"))
        finally:
            self._unloading = None
            self._change()

    def _change(self) -> None:
        if self._loading is None and self._unloading is None and self._has_other_text():  # replaced, and started again
            self._loading = asyncio.create_task(self._load(), name=f"load {self.name}")
        client, tokenizer = self.client, self.tokenizer
        if client is not None and tokenizer is not None and not self._has_other_text():
            client.teach(tokenizer.vocabulary)
        self.num_changes += 1
        self._changed(self)

    async def _stop(self, reason: LoraplexError) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.wait({self._loading})
        self._text_error = ""
        await self.supervisor.stop(reason)


class ModelHost:
    """All models. `Catalog` asks it which of them serve."""

    def __init__(self, configs: Iterable[HostedModelConfig], supervise: Supervise) -> None:
        self._subscribers: list[Callable[[HostedModel], None]] = []
        self._models = {config.name: HostedModel(config, supervise, self._publish) for config in configs}

    def subscribe(self, callback: Callable[[HostedModel], None]) -> Callable[[], None]:
        """Call `callback`, which must not block, after every change of a model. Returns a function that ends this."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def all(self) -> list[HostedModel]:
        """All models, ordered by name."""
        return [self._models[name] for name in sorted(self._models)]

    def get(self, name: str) -> HostedModel:
        """The model with this bare id. Raises NotFound (MODEL_NOT_FOUND)."""
        if name not in self._models:
            there_are = ", ".join(sorted(self._models))
            message = f"there is no model {name!r}; there are: {there_are}"
            raise NotFound("MODEL_NOT_FOUND", f"models/{name}", message)
        return self._models[name]

    def find(self, name: str) -> HostedModel | None:
        """The model with this bare id; None: there is none."""
        return self._models.get(name)

    def serving(self, name: str) -> LoadedModel:
        """The snapshot of this model. Raises NotFound (MODEL_NOT_FOUND), and what `HostedModel.serving` raises."""
        return self.get(name).serving()

    async def successor(self, name: str, revision: str) -> EngineClient:
        """Wait as `HostedModel.successor` does. Raises NotFound (MODEL_NOT_FOUND), and what `successor` raises."""
        return await self.get(name).successor(revision)

    def start(self) -> None:
        """Begin to load the models that are configured to load at start."""
        for model in self._models.values():
            if model.config.load:
                model.load()

    async def close(self, reason: LoraplexError) -> None:
        """End all engines, and the requests that still run with `reason`."""
        await asyncio.gather(*(model.close(reason) for model in self._models.values()))

    def _publish(self, model: HostedModel) -> None:
        for callback in list(self._subscribers):
            try:
                callback(model)
            except Exception:  # of one who listens: the supervision that tells it must go on
                logger.exception("a change of model %s could not be followed", model.name)


def _read_text_files(config: HostedModelConfig) -> tuple[Tokenizer, str]:
    """Read the tokenizer and the revision. Raises TextError, OSError."""
    path = Path(config.model) if config.is_local else _fetched(config)
    tokenizer = Tokenizer.load(path)
    if config.chat_template is not None:
        source = Path(config.chat_template).read_text(encoding="utf-8")
        tokenizer.use_chat_template(source)
    _ = tokenizer.vocabulary  # made here, in a thread: the engine is told it as soon as it serves
    return tokenizer, _revision(path)


def revision_of(config: HostedModelConfig) -> str:
    """The revision of a model's files now; "": they have not been fetched from the hub yet. Raises OSError."""
    if config.is_local:
        return _revision(Path(config.model))
    try:
        return _revision(_fetched(config))
    except FileNotFoundError:
        return ""


def _check_ids(tokenizer: Tokenizer, sampling: Sampling, vocab_size: int) -> None:
    """Raise TextError if the model lacks a token id that the service adds to requests: else each would fail."""
    places = {
        "eos_token of the tokenizer, or eos_token_id of another file": tokenizer.eos_token_ids,
        "what the tokenizer adds to a text, such as bos_token": tokenizer.encode(""),
        "default_sampling.logit_bias": sampling.logit_bias,
        "default_sampling.allowed_token_ids": sampling.allowed_token_ids,
    }
    for place, token_ids in places.items():
        outside = [token_id for token_id in token_ids if token_id >= vocab_size]
        if outside:
            raise TextError(
                f"{place}: {', '.join(map(str, outside))} is none of the model's {vocab_size} token ids. Use the "
                "tokenizer that belongs to these weights, or correct the id"
            )


def _fetched(config: HostedModelConfig) -> Path:
    """The directory into which the engine has fetched a model from the hub, or the GGUF file in it."""
    from huggingface_hub import snapshot_download  # only where it is needed: it takes a third of a second to import

    repository, file = hub_parts(config.model)
    found = Path(snapshot_download(repository, revision=config.revision, local_files_only=True))
    return found if file is None else found / file


def _revision(path: Path) -> str:
    """The commit of a hub snapshot; for others a digest over the files' names, sizes and times.

    The content is not digested: that would read every byte of the weights once more.
    """
    is_file = path.is_file()
    for directory in path.parents if is_file else (path,):
        if directory.parent.name == "snapshots":
            return directory.name
    files = parts_of(path) if is_file else sorted(file for file in path.iterdir() if file.suffix in REVISED)
    stats = [(path.name, path.stat()) for path in files]
    listing = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return f"local-{hashlib.sha256(listing.encode()).hexdigest()[:12]}"
