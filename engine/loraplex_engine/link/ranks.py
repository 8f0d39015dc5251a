"""How many processes compute one model together, and on which devices. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loraplex_engine.link.bounds import Bounds

DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d{0,2}))?")
RANK_DEVICE = re.compile(r"cpu|cuda:(0|[1-9]\d{0,2})")
MAX_RANKS = 64
RANKS = Bounds(1, MAX_RANKS)


def rank_problems(
    device: str, devices: Sequence[str], tensor_parallel: int, pipeline_parallel: int, machines: int
) -> Iterator[str]:
    """Problems with the numbers of ranks and machines, and with the devices of a machine."""
    world = tensor_parallel * pipeline_parallel
    if min(tensor_parallel, pipeline_parallel) < 1:
        return  # which is named as such
    if world > MAX_RANKS:
        yield (
            f"tensor_parallel {tensor_parallel} times pipeline_parallel {pipeline_parallel} must be 1 to {MAX_RANKS} "
            "ranks"
        )
        return
    if machines < 1 or world % machines:
        yield f"machines {machines}: {world} ranks cannot be shared out equally: take a number that divides them"
        return
    if not devices:
        return
    wrong = [each for each in devices if not RANK_DEVICE.fullmatch(each)]
    if wrong:
        yield f"devices: {', '.join(map(repr, wrong))}: each is cpu or cuda:N"
    elif len({each.partition(":")[0] for each in devices}) > 1:
        yield f"devices {', '.join(devices)}: they must be of one kind"
    elif devices[0] != "cpu" and len(set(devices)) < len(devices):
        yield f"devices {', '.join(devices)}: a GPU is named twice, and each rank needs one of its own"
    if len(devices) != world // machines:
        of_each = "" if machines == 1 else f", divided by machines {machines}"
        yield (
            f"devices names {len(devices)}: {world // machines} are needed, tensor_parallel {tensor_parallel} times "
            f"pipeline_parallel {pipeline_parallel}{of_each}"
        )
    if device != "auto":
        yield f"device {device!r} and devices are both given: leave device out"


def rank_devices(device: str, devices: Sequence[str], ranks: int) -> tuple[str, ...]:
    """The device of each rank of a machine. `auto` and `cuda` stay what they are for one; several take the GPUs from
    there on.

    auto: of several ranks, the first decides, and the others have been told.
    """
    if devices:
        return tuple(devices)
    if ranks == 1 or not device.startswith("cuda"):
        return (device,) * ranks
    first = int(device.partition(":")[2] or 0)
    return tuple(f"cuda:{first + rank}" for rank in range(ranks))
