"""Classification heads: which adapters and models have one, and what its logits mean."""

import math
from collections.abc import Iterator, Sequence

from loraplex.v1.pooling_pb2 import ACTIVATION_SIGMOID, ACTIVATION_UNSPECIFIED, Activation
from loraplex_engine.link.pooling import ClassifierFacts
from loraplex_service.errors import FeatureUnsupported
from loraplex_service.names.target import Target
from loraplex_service.requests.entrance import Entered


def check_generates(target: Target, entered: Entered, path: str) -> None:
    """Raise FeatureUnsupported for an adapter with a head, and for a model that has one in place of a language model's.

    `path`: the field that names the target.
    """
    own = _adapters_head(target, entered)
    if own is not None or target.model.limits.classifier is not None:
        name = entered.target.model if own is None else entered.target.adapter_version
        raise FeatureUnsupported(path, f"{name} has a classification head, and generates no text: ask Classify")


def head_of(target: Target, entered: Entered, path: str) -> ClassifierFacts:
    """The adapter's head, or else the model's. Raises FeatureUnsupported where there is none."""
    head = _adapters_head(target, entered) or target.model.limits.classifier
    if head is None:
        name = entered.target.adapter_version or f"{entered.target.model}, without an adapter,"
        raise FeatureUnsupported(path, f"{name} has no classification head: name an adapter or a model that has one")
    return head


def _adapters_head(target: Target, entered: Entered) -> ClassifierFacts | None:
    """That of the one adapter that the request runs with; sums have no heads."""
    if entered.adapter is None or target.adapter is None:
        return None
    facts = target.model.client.adapters.facts(target.adapter.key)
    return None if facts is None else facts.classifier


def label_names(target: Target, num_labels: int) -> Sequence[str]:
    """What the labels are called: as the model's configuration says, if that has as many."""
    known = target.model.limits.labels
    return known if len(known) == num_labels else [f"LABEL_{index}" for index in range(num_labels)]


def probabilities(logits: Sequence[float], num_labels: int, activation: Activation.ValueType) -> Iterator[float]:
    """The probabilities of rows of logits, one row after another."""
    if activation == ACTIVATION_SIGMOID or (activation == ACTIVATION_UNSPECIFIED and num_labels == 1):
        yield from map(sigmoid, logits)
        return
    for start in range(0, len(logits), num_labels):
        row = logits[start : start + num_labels]
        highest = max(row)
        weights = [math.exp(logit - highest) for logit in row]
        total = sum(weights)
        yield from (weight / total for weight in weights)


def sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    weight = math.exp(logit)
    return weight / (1 + weight)
