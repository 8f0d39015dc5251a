"""Which GPU each model gets, and what part of it: by their sizes, and never two models over one GPU's memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraplex_engine.link.config import USUAL_MEMORY_FRACTION
from loraplex_engine.link.sizes import DeviceMemory, Needs, readable

ANY_GPU = ("auto", "cuda")
ROUNDING = 1e-9  # fractions are sums of decimals
REMEDY = (
    "quantise it, lower its max_model_len, max_num_batched_tokens or adapter_device_bytes, serve fewer models, or give "
    "it another device"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a model asks of one GPU; of each of its ranks' GPUs, where it has several."""

    name: str  # of the model
    device: str = "auto"  # or "cuda": any GPU; "cuda:N": that one
    fraction: float | None = None  # of the GPU's memory; None: a part of what is left
    needs: Needs | None = None  # None: unknown, since it is not loaded

    def least(self, gpu: DeviceMemory) -> float:
        """The bytes that it takes at least."""
        if self.fraction is not None:
            return self.fraction * gpu.total_bytes
        return 0 if self.needs is None else self.needs.least(gpu.name)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the memory of a GPU, or of each of several."""

    devices: tuple[str, ...]
    fraction: float


@dataclass(slots=True)
class _Gpu:
    """A GPU with the models that are on it so far."""

    memory: DeviceMemory
    there: list[Wish] = field(default_factory=list)

    def may_have(self, wish: Wish) -> bool:
        """Whether a model may be here, if there is room: it asks for this GPU or any, and no other rank of it is."""
        return wish.device in (*ANY_GPU, self.memory.name) and all(each.name != wish.name for each in self.there)

    def room(self, wish: Wish) -> float:
        """The bytes that a model could have: without a fraction of its own, of what is usual alone."""
        limit = 1.0 if wish.fraction is not None else USUAL_MEMORY_FRACTION
        taken = sum(each.least(self.memory) for each in self.there)
        return (limit + ROUNDING) * self.memory.total_bytes - taken

    def parts(self) -> dict[str, float]:
        """The fraction of each model: its own, or an equal part of what is left, but none less than it needs."""
        own = {each.name: each.fraction for each in self.there if each.fraction is not None}
        least = {each.name: each.least(self.memory) for each in self.there if each.fraction is None}
        left = (USUAL_MEMORY_FRACTION - sum(own.values())) * self.memory.total_bytes
        return own | {name: part / self.memory.total_bytes for name, part in shared_out(left, least).items()}


def arrange(wishes: Sequence[Wish], gpus: Sequence[DeviceMemory]) -> tuple[dict[str, Part], dict[str, str]]:
    """The part of each model, by name; and why others get none.

    Those with a fraction or a device of their own come first, then the largest: each to where the most room is. Wishes
    of one name are of its ranks, and each gets a GPU of its own.
    """
    places = [_Gpu(gpu) for gpu in gpus]
    refused: dict[str, str] = {}
    for wish in sorted(wishes, key=lambda wish: (wish.fraction is None, wish.device in ANY_GPU, -wish.least(gpus[0]))):
        if wish.name in refused:
            continue
        candidates = [place for place in places if place.may_have(wish)]
        best = max(candidates, key=lambda place: (place.room(wish), -len(place.there)), default=None)
        problem = _no_such_device(wish, gpus) if best is None else _problem(wish, best)
        if best is None or problem:
            refused[wish.name] = problem
            for place in places:
                place.there = [each for each in place.there if each.name != wish.name]
        else:
            best.there.append(wish)
    found: dict[str, Part] = {}
    for place in places:
        for name, fraction in place.parts().items():
            before = found.get(name, Part((), 1.0))
            found[name] = Part((*before.devices, place.memory.name), min(before.fraction, fraction))
    return found, refused


def shared_out(left: float, least: Mapping[str, float]) -> dict[str, float]:
    """Equal parts of what is left; whoever needs more than such a part gets what it needs, and the others the rest."""
    if not least:
        return {}
    equal = left / len(least)
    above = {name: size for name, size in least.items() if size > equal}
    if not above:
        return dict.fromkeys(least, equal)
    rest = {name: size for name, size in least.items() if name not in above}
    return above | shared_out(left - sum(above.values()), rest)


def needs_text(needs: Needs, device: str, ranks: int = 1) -> str:
    """What so many ranks of a model need of a device, for people: the sum and its parts."""
    return f"{readable(needs.least(device, ranks))} at least ({needs.listed(device, ranks)})"


def _no_such_device(wish: Wish, gpus: Sequence[DeviceMemory]) -> str:
    there = ", ".join(gpu.name for gpu in gpus)
    if wish.device in ANY_GPU:
        return f"it has more ranks than this machine has GPUs ({there}): lower tensor_parallel or pipeline_parallel"
    return f"device {wish.device!r} is asked for, and this machine has {there}"


def _problem(wish: Wish, gpu: _Gpu) -> str:
    """Why a model cannot be on the GPU; empty: it can."""
    memory, room, least = gpu.memory, gpu.room(wish), wish.least(gpu.memory)
    if wish.fraction is not None and wish.needs is not None and wish.needs.least(memory.name) > least:
        return (
            f"it needs {needs_text(wish.needs, memory.name)}, and its device_memory_fraction of {wish.fraction:g} is "
            f"{readable(least)} of {memory.name}: raise it, or {REMEDY}"
        )
    if least <= room and room > ROUNDING * memory.total_bytes:
        return ""
    wanted = f"a fraction of {wish.fraction:g}" if wish.fraction is not None else "memory"
    if wish.needs is not None:
        wanted = needs_text(wish.needs, memory.name)
    beside = ", ".join(f"{each.name!r} {readable(each.least(memory))}" for each in gpu.there)
    return (
        f"it needs {wanted}, and {memory.name}, where the most room is, has {readable(max(room, 0))} left of "
        f"{readable(memory.total_bytes)}{' beside ' + beside if beside else ''}: {REMEDY}"
    )
