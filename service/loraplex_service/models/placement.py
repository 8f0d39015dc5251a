"""The places of a service's models on the devices of its machine: given out when the engines say what they need."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from loraplex_engine.link.config import USUAL_CACHE_FRACTION
from loraplex_engine.link.messages import EngineSized, LoadOn
from loraplex_engine.link.sizes import HOST, DeviceMemory, Needs, readable
from loraplex_service.models.config import HostedModelConfig
from loraplex_service.models.devices import REMEDY, ROUNDING, Part, Wish, arrange, needs_text

logger = logging.getLogger(__name__)


class NoRoomError(ValueError):
    """A model does not fit. The message says what it needs, what there is, and what can be done."""


class Seat(Protocol):
    """One model's side of a placement."""

    async def take(self, sized: EngineSized) -> LoadOn:
        """Where the model is to be loaded. Raises NoRoomError."""

    def leave(self) -> None:
        """Note that no engine of the model runs, nor will by itself."""


class Placement:
    """Gives every model its device. For one event loop.

    GPUs are given out once all models that load at the start have said what they need, or have failed. A loaded model
    keeps its place, however often its engine starts again. For one that is not loaded a part is set aside, which gives
    way to what a loaded one needs.
    """

    def __init__(self, models: Sequence[HostedModelConfig]) -> None:
        self._models = {model.name: model for model in models}
        self._awaited = {model.name for model in models if model.load and not is_on_host(model)}
        self._all_known = asyncio.Event()
        self._needs: dict[str, Needs] = {}  # of the models that are loaded, or are being loaded
        self._on_host: set[str] = set()
        self._parts: dict[str, Part] = {}  # of GPUs
        self._arranged = False

    def seat(self, name: str) -> Seat:
        return _Seat(self, name)

    async def take(self, name: str, sized: EngineSized) -> LoadOn:
        self._needs[name] = sized.needs
        host, *gpus = sized.devices
        self._known(name)
        if is_on_host(self._models[name]) or not gpus:
            there = [model for model in self._models.values() if is_on_host(model) or not gpus]
            return self._take_host(name, sized.needs, host, there)
        if not self._all_known.is_set():
            logger.info("model %s waits for the sizes of %s, to share the GPUs", name, ", ".join(sorted(self._awaited)))
            await self._all_known.wait()
        return self._take_gpu(name, gpus)

    def leave(self, name: str) -> None:
        self._known(name)
        self._needs.pop(name, None)
        self._on_host.discard(name)

    def _known(self, name: str) -> None:
        self._awaited.discard(name)
        if not self._awaited:
            self._all_known.set()

    # ---- GPUs --------------------------------------------------------------------------------------------------------

    def _take_gpu(self, name: str, gpus: Sequence[DeviceMemory]) -> LoadOn:
        if not self._arranged:
            wishes = [wish for model in self._models.values() if not is_on_host(model) for wish in self._wishes(model)]
            self._parts, _ = arrange(wishes, gpus)  # of a refused one the reason is found again when it asks
            self._arranged = True
        part, needs = self._parts.get(name), self._needs[name]
        memory = {gpu.name: gpu.total_bytes for gpu in gpus}
        if part is None or any(needs.least(each) > (part.fraction + ROUNDING) * memory[each] for each in part.devices):
            part = self._part_beside_the_others(name, gpus)
        logger.info(
            "model %s is placed on %s, with %s of its memory: it needs %s",
            name,
            ", ".join(part.devices),
            " and ".join(sorted({readable(part.fraction * memory[each]) for each in part.devices})),
            needs_text(needs, part.devices[0]),
        )
        return LoadOn(list(part.devices), part.fraction)

    def _part_beside_the_others(self, name: str, gpus: Sequence[DeviceMemory]) -> Part:
        """A part for a model that got none at the start, or needs more than was set aside. Raises NoRoomError.

        Where there is no room, the parts of models that are not loaded give way: they get what is left.
        """
        others = {other: part for other, part in self._parts.items() if other != name}
        loaded = {other: part for other, part in others.items() if other in self._needs}
        idle = [
            wish
            for model in self._models.values()
            if model.name not in self._needs and model.device_memory_fraction is None and not is_on_host(model)
            for wish in self._wishes(model)
        ]
        for kept, rest in ((others, []), (loaded, idle)):
            taken = [Wish(other, each, part.fraction) for other, part in kept.items() for each in part.devices]
            parts, refused = arrange([*taken, *rest, *self._wishes(self._models[name])], gpus)
            if name not in refused:
                self._parts = parts
                return parts[name]
        raise NoRoomError(f"model {name!r} does not fit: {refused[name]}")

    def _wishes(self, model: HostedModelConfig) -> list[Wish]:
        needs = self._needs.get(model.name)
        return [Wish(model.name, device, model.device_memory_fraction, needs) for device in model.rank_devices]

    # ---- the host ----------------------------------------------------------------------------------------------------

    def _take_host(self, name: str, needs: Needs, host: DeviceMemory, models: Sequence[HostedModelConfig]) -> LoadOn:
        """models: all that are to be there, loaded or not.

        Raises NoRoomError where those that are loaded would need more than the host has.
        """
        there = {each.name: each.machine_ranks for each in models}
        beside = {other: self._needs[other].least(HOST, there[other]) for other in self._on_host - {name}}
        left = host.total_bytes - sum(beside.values())
        if needs.least(HOST, there[name]) > left:
            taken = ", ".join(f"{other!r} {readable(size)}" for other, size in sorted(beside.items()))
            raise NoRoomError(
                f"model {name!r} does not fit: it needs {needs_text(needs, HOST, there[name])}, and the host has "
                f"{readable(left)} left of {readable(host.total_bytes)}{' beside ' + taken if taken else ''}: {REMEDY}"
            )
        self._on_host.add(name)
        sharing = [each for each in models if each.kv_cache_bytes is None and each.kv_cache_fraction is None]
        own = self._models[name].kv_cache_fraction
        ranks = [HOST] * there[name]
        return LoadOn(ranks, own if own is not None else USUAL_CACHE_FRACTION / max(1, len(sharing)))


def is_on_host(model: HostedModelConfig) -> bool:
    """Whether a model is on the CPU, whatever GPUs there are."""
    return model.rank_devices[0] == HOST


class _Seat:
    def __init__(self, placement: Placement, name: str) -> None:
        self._placement = placement
        self._name = name

    async def take(self, sized: EngineSized) -> LoadOn:
        return await self._placement.take(self._name, sized)

    def leave(self) -> None:
        self._placement.leave(self._name)
