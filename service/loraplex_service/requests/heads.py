"""Classification heads: which adapters have one, and what its logits mean."""

import math
from collections.abc import Iterator, Sequence

from loraplex.v1.pooling_pb2 import ACTIVATION_SIGMOID, ACTIVATION_UNSPECIFIED, Activation
from loraplex_engine.link.messages import AdapterFacts
from loraplex_service.errors import FeatureUnsupported
from loraplex_service.names.target import Target
from loraplex_service.requests.entrance import Entered


def check_generates(target: Target, entered: Entered, path: str) -> None:
    """Raise FeatureUnsupported for an adapter with a head. `path`: the field that names the target."""
    facts = _facts(target, entered)
    if facts is not None and facts.num_labels:
        name = entered.target.adapter_version
        raise FeatureUnsupported(path, f"{name} has a classification head, and generates no text: ask Classify")


def head_of(target: Target, entered: Entered, path: str) -> AdapterFacts:
    """The adapter with its head. Raises FeatureUnsupported where there is none."""
    facts = _facts(target, entered)
    if facts is None or not facts.num_labels:
        name = entered.target.adapter_version or f"{entered.target.model}, without an adapter,"
        raise FeatureUnsupported(path, f"{name} has no classification head: name an adapter that has one")
    return facts


def _facts(target: Target, entered: Entered) -> AdapterFacts | None:
    """What is known of the one adapter that the request runs with; sums have no heads."""
    if entered.adapter is None or target.adapter is None:
        return None
    return target.model.client.adapters.facts(target.adapter.key)


def label_names(target: Target, num_labels: int) -> Sequence[str]:
    """What the labels are called: as the base's configuration says, if that has as many."""
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
