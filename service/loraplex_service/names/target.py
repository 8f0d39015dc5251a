"""What a name resolves to: a model that serves, adapter versions of it, and the defaults for requests."""

from dataclasses import dataclass

from loraplex.v1.generation_pb2 import Constraint, Sampling
from loraplex.v1.routes_pb2 import ResolvedTarget, Route
from loraplex_adapters.key import AdapterKey, compose
from loraplex_adapters.versions import AdapterVersion
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import EngineLimits
from loraplex_service.text import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model that serves: a snapshot for the life of one request. A restarted engine makes a new one."""

    name: str  # bare id: "demo", not "models/demo"
    revision: str  # the revision of the weights: a commit or a digest
    limits: EngineLimits
    client: EngineClient
    tokenizer: Tokenizer
    default_sampling: Sampling  # fields that are absent have the contract's defaults
    literal_content: bool = False  # for chats that do not set literal_content


@dataclass(frozen=True, slots=True)
class Target:
    """The model and the adapter versions that a request runs on."""

    model: LoadedModel
    adapter: AdapterVersion | None = None  # None: the base model alone, or a composition
    route: Route | None = None  # the route that led here
    parts: tuple[tuple[AdapterVersion, float], ...] = ()  # the adapters of a composition and their weights

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        """The adapter versions that a request uses."""
        return (self.adapter,) if self.adapter is not None else tuple(version for version, _ in self.parts)

    @property
    def adapter_key(self) -> AdapterKey | None:
        """The key of the adapter, or of the weighted sum; None: the base model alone."""
        if self.parts:
            return compose((version.key, weight) for version, weight in self.parts)
        return None if self.adapter is None else self.adapter.key

    @property
    def default_sampling(self) -> Sampling:
        """The sampling defaults for absent fields of a request: the route's, else the model's."""
        defaults = self.model.default_sampling
        return defaults if self.route is None else merged_sampling(self.route.default_sampling, defaults)

    @property
    def default_constraint(self) -> tuple[Constraint, str]:
        """The form of the outputs of requests that set none, and the name of the route or adapter that says so.

        An empty one, of nobody: any text.
        """
        if self.route is not None and self.route.HasField("default_constraint"):
            return self.route.default_constraint, self.route.name
        if self.adapter is not None and self.adapter.spec.default_constraint:
            return Constraint.FromString(self.adapter.spec.default_constraint), self.adapter.version_name
        return Constraint(), ""

    def resolved(self, fell_back_to_base: bool = False) -> ResolvedTarget:
        """The message that tells the caller what runs.

        `fell_back_to_base`: the adapter was cold, the request allowed it.
        """
        adapter_version = "" if self.adapter is None else self.adapter.version_name
        if self.parts:
            adapter_version = " + ".join(f"{version.version_name}*{weight:g}" for version, weight in self.parts)
        return ResolvedTarget(
            model=f"models/{self.model.name}",
            model_revision=self.model.revision,
            quantization=self.model.limits.quantization,
            adapter_version="" if fell_back_to_base else adapter_version,
            route=self.route.name if self.route is not None else "",
            fell_back_to_base=fell_back_to_base,
            constraint_source=self.default_constraint[1],
        )


def merged_sampling(spec: Sampling, defaults: Sampling) -> Sampling:
    """Merge the caller's fields with the defaults for absent ones. A list or map counts as set if it is not empty."""
    merged = Sampling()
    merged.CopyFrom(defaults)
    for field, _ in spec.ListFields():
        merged.ClearField(field.name)  # type: ignore[arg-type]  # lists must be replaced, not appended to
    merged.MergeFrom(spec)
    return merged
