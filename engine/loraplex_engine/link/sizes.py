"""The memory that a model needs, and the memory that there is. Torch-free: the service places models by it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

HOST = "cpu"


class DeviceMemory(msgspec.Struct, array_like=True, frozen=True):
    """A device of this machine, and its whole memory; of the host what its cgroup allows."""

    name: str  # "cpu", "cuda:0"
    total_bytes: int


class Needs(msgspec.Struct, array_like=True, frozen=True):
    """What a model takes at least, in bytes, as its files and its configuration say; of several ranks each one.

    See docs/sizing.md.
    """

    weights: int
    cache: int  # kv_cache_bytes; without it, of one sequence of max_model_len tokens
    step: int  # temporaries of the largest step
    adapters: int  # that are set aside for them on a GPU; on the host they take what they need
    host_cache: int = 0  # host_cache_bytes

    def parts(self, device: str) -> Mapping[str, int]:
        """By their names, on this device."""
        parts = {"weights": self.weights, "cache": self.cache, "a step": self.step}
        return parts | ({"host cache": self.host_cache} if device == HOST else {"adapters": self.adapters})

    def least(self, device: str, ranks: int = 1) -> int:
        """All of them together, of so many ranks on this device."""
        return ranks * sum(self.parts(device).values())

    def listed(self, device: str, ranks: int = 1) -> str:
        """All of them, for people."""
        listed = ", ".join(f"{name} {readable(size)}" for name, size in self.parts(device).items() if size)
        return listed if ranks == 1 else f"{listed} for each of {ranks} ranks"


def readable(num_bytes: float) -> str:
    """A number of bytes, for people: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
