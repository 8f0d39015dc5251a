"""Where an adapter is, from far to near."""

import enum


class Residency(enum.IntEnum):
    """The closest place to the device. The numbers are those of loraplex.v1.AdapterResidency."""

    DISK = 1  # registered only
    HOST = 2  # in host memory, bound to the model
    DEVICE = 3  # a request for it starts at once
