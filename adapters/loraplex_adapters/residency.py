"""The tiers in which an adapter may be, from far to near."""

import enum


class Residency(enum.IntEnum):
    """The tier nearest to the device that holds the adapter. Numbers as in loraplex.v1.AdapterResidency."""

    DISK = 1  # registered only
    HOST = 2  # in host memory, bound to the model
    DEVICE = 3  # a request for it starts at once
