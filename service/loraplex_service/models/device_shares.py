"""The division of a GPU's memory between the models on it."""

from collections.abc import Iterator, Sequence

import msgspec

from loraplex_engine.link.config import USUAL_MEMORY_FRACTION
from loraplex_service.models.config import HostedModelConfig


def share_problems(models: Sequence[HostedModelConfig]) -> Iterator[str]:
    """Problems with GPUs whose models would take more than the whole memory."""
    for gpu, together in _by_gpu(models).items():
        named, unnamed = _named(together), _unnamed(together)
        total = sum(named.values())
        if total > 1 + 1e-9:  # fractions are sums of decimals
            yield (
                f"device_memory_fraction: {', '.join(f'{name!r} {share:g}' for name, share in named.items())} are on "
                f"{gpu}, and {total:g} together: make it at most 1"
            )
        elif unnamed and total >= USUAL_MEMORY_FRACTION:
            yield (
                f"device_memory_fraction: {', '.join(map(repr, named))} leave nothing of {gpu} to "
                f"{', '.join(map(repr, unnamed))}: models without a fraction share the rest of "
                f"{USUAL_MEMORY_FRACTION:g}"
            )


def with_shares(models: Sequence[HostedModelConfig]) -> tuple[HostedModelConfig, ...]:
    """Give each model that shares a GPU a fraction of it: the configured one, or an equal part of the rest."""
    shares: dict[str, float | None] = {}
    for together in _by_gpu(models).values():
        named, unnamed = _named(together), _unnamed(together)
        if len(together) > 1:
            left = USUAL_MEMORY_FRACTION - sum(named.values())
            shares |= named | {name: left / len(unnamed) for name in unnamed}
    return tuple(
        msgspec.structs.replace(model, device_memory_fraction=shares.get(model.name, model.device_memory_fraction))
        for model in models
    )


def _by_gpu(models: Sequence[HostedModelConfig]) -> dict[str, list[HostedModelConfig]]:
    found: dict[str, list[HostedModelConfig]] = {}
    for model in models:
        if model.device != "cpu":
            found.setdefault("cuda:0" if model.device in ("auto", "cuda") else model.device, []).append(model)
    return found


def _named(models: Sequence[HostedModelConfig]) -> dict[str, float]:
    return {model.name: model.device_memory_fraction for model in models if model.device_memory_fraction is not None}


def _unnamed(models: Sequence[HostedModelConfig]) -> list[str]:
    return [model.name for model in models if model.device_memory_fraction is None]
