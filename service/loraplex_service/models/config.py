"""The parts of the configuration that name the models and say how their engines are supervised."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from loraplex.v1.generation_pb2 import Sampling
from loraplex_adapters.files.gguf import SUFFIX, GGUFError, parts_of
from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_engine.link.config import EngineConfig
from loraplex_service.models.generation_defaults import sampling_of_file


def is_model(path: Path) -> bool:
    """Whether a path may be that of a model: of a directory, or of a GGUF file."""
    return path.is_dir() or (path.suffix == SUFFIX and path.is_file())


class HostedModelConfig(EngineConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One base model: its name in the API, the settings of its engine, and the defaults of its requests."""

    name: str  # the name in the API: `models/{name}`, or the bare name
    load: bool = True  # load at the start; else when LoadModel is called
    # fields of `loraplex.v1.Sampling`, for requests that leave them out. `none`: not even the model's
    # own files give any. Left out: those. See docs/configuration.md#default-sampling
    default_sampling: dict[str, Any] | Literal["none"] | None = None
    chat_template: str | None = None  # a Jinja file that replaces the model's own
    # the text of chats never becomes control tokens, unless a request asks for it. See
    # docs/configuration.md#literal-content
    literal_content: bool = False
    labels: dict[str, str] = {}  # for your own use

    @property
    def is_local(self) -> bool:
        """Whether `model` is a directory or a file (an absolute path, once the configuration is read) and no hub id."""
        return self.model.startswith("/")

    def engine(self) -> EngineConfig:
        """The configuration for the engine process."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.__struct_fields__})

    def sampling(self) -> Sampling:
        """`default_sampling` as a message of the contract. Raises ValueError naming the field at fault."""
        if self.default_sampling is None or self.default_sampling == "none":
            return Sampling()
        sampling = sampling_of_file(self.default_sampling, "default_sampling")
        if sampling.HasField("best_of"):
            raise ValueError("default_sampling.best_of: cannot be a default, since what is ranked cannot be streamed")
        return sampling

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        if not is_id(self.name):
            yield f"the name must be {ID_RULE}"
        small = self.drafts.model if self.drafts is not None else None
        for field, model in (("model", self.model), ("drafts.model", small)):
            yield from () if model is None else _place_problems(field, model)
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            yield f"chat_template: there is no file {self.chat_template}"
        for check in (self.check, self.sampling):
            try:
                check()
            except ValueError as error:
                yield str(error)


def _place_problems(field: str, model: str) -> Iterator[str]:
    if model.startswith("/") and not is_model(Path(model)):
        yield f"{field}: there is no directory {model}, and no {SUFFIX} file of that name"
    try:
        parts_of(Path(model))
    except GGUFError as error:
        yield f"{field}: {model} {error}"


class SupervisionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When an engine counts as stuck, and how often it is started again."""

    heartbeat_seconds: float = 2.0  # time between two pings of an engine
    # an engine that does not answer for so long is replaced. Keep it above the longest step: engines answer between
    # steps
    heartbeat_timeout_seconds: float = 60.0
    # an engine that loads, and of which nothing new is heard for so long, is replaced like one that dies. News are
    # bytes of weights read or downloaded. An engine that waits for its turn on a GPU says so, and may wait for as long
    # as it takes
    load_timeout_seconds: float = 1800.0
    restart_delay_seconds: float = 0.5  # delay before the first restart; doubles with each
    restart_delay_max_seconds: float = 30.0  # the longest delay
    stable_seconds: float = 60.0  # an engine that ran so long starts again with the first delay
    failed_starts: int = 5  # failed loads in a row after which the model is FAILED
    stop_seconds: float = 10.0  # time for an engine to end before it is killed
    # when an engine dies, running requests wait so long for the next one, and go on there from the tokens that they
    # have. 0: they end UNAVAILABLE at once. See docs/configuration.md#supervision
    resume_seconds: float = 60.0
