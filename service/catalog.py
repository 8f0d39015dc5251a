"""What a request's field `model` means, and everything that a request needs of the model that it names."""

from dataclasses import dataclass
from typing import Protocol

from engine.client import EngineClient
from engine.messages import ModelLimits
from loraplex.v1.generation_pb2 import Sampling
from service.text import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model that serves: a snapshot, good for the life of one request. A restarted engine makes a new one."""

    name: str  # bare id: "demo", not "models/demo"
    revision: str  # of the weights: a commit or a digest
    limits: ModelLimits
    client: EngineClient
    tokenizer: Tokenizer
    default_sampling: Sampling  # fields that are absent have the contract's defaults


class Models(Protocol):
    """The base models that the operator configured."""

    def serving(self, name: str) -> LoadedModel:
        """The model with this bare id.

        Raises NotFound (MODEL_NOT_FOUND), FailedPrecondition (MODEL_UNLOADED) or Unavailable (MODEL_LOADING,
        ENGINE_RESTARTING).
        """
