"""The choice of a replica: a pure function of how each one stands."""

import enum
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Health(enum.Enum):
    """What a replica says of itself."""

    SERVING = "serving"
    DRAINING = "draining"  # it serves what it has, and takes nothing new
    DEAD = "dead"  # it does not answer
    UNKNOWN = "unknown"  # it was not heard of yet


class Place(enum.IntEnum):
    """Where an adapter is on a replica, the nearest last."""

    FULL = 0  # not on the device, and every slot there is in use
    ROOM = 1  # on disk, with a slot that nothing uses
    HOST = 2  # in host memory, with such a slot
    DEVICE = 3  # on the device, or on its way there
    ACTIVE = 4  # on the device, in use


@dataclass(frozen=True, slots=True)
class Standing:
    """One replica at one moment, to one request."""

    endpoint: str  # "ip:port"
    health: Health
    is_fresh: bool  # whether the rest is known
    place: Place = Place.FULL  # of the request's adapters, that which is farthest
    num_requests: int = 0  # that it has, and was given since it said so


def ranked(replicas: Iterable[Standing], key: str, queue: int, balance: float) -> Sequence[Standing]:
    """The replicas that may serve a request, the best one first; empty: nothing is known of any that serves.

    The one that has the adapter nearest to the device comes first, of equal ones the one with the fewest requests, of
    those the one that `key` points to. One with more than `queue` requests is passed over while it has more than
    `balance` times the mean: so a hot adapter spreads over more replicas, and a slow one, whose adapters stay in use
    the longer, does not draw more and more. Whether requests wait is not asked: a replica runs many at once, each the
    slower for the others. Where most of those that may serve are not known, none is named: the few that are would get
    everything.
    """
    possible = [replica for replica in replicas if replica.health in (Health.SERVING, Health.UNKNOWN)]
    usable = [replica for replica in possible if replica.health is Health.SERVING and replica.is_fresh]
    if 2 * len(usable) < len(possible):
        return []
    total = sum(replica.num_requests for replica in usable)

    def order(replica: Standing) -> tuple[bool, int, int, bytes, str]:
        is_crowded = replica.num_requests > queue and replica.num_requests * len(usable) > balance * total
        nearness, load = -replica.place, replica.num_requests
        first, second = (load, nearness) if is_crowded else (nearness, load)
        return is_crowded, first, second, _points_to(key, replica.endpoint), replica.endpoint

    return sorted(usable, key=order)


def _points_to(key: str, endpoint: str) -> bytes:
    """Rendezvous hashing: of the same replicas, a key points to the same one, and to another only if that one goes."""
    return hashlib.blake2b(f"{key}\n{endpoint}".encode(errors="replace"), digest_size=8).digest()
