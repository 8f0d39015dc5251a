"""What the metrics page says of a replica and its fleet."""

from dataclasses import dataclass


@dataclass(slots=True)
class FleetFigures:
    """The figures at one moment."""

    connected: bool = False
    behind: int = 0  # changes that are known of, and not in force here yet
    cursor: int = 0  # the number of the last change that is in force here
    applied: int = 0  # changes by others
    passed_over: int = 0  # changes that could not be read
    schema: int = 0  # of the database's tables
    lost: int = 0  # times that the database could not be used
    peers: int = 0  # other replicas that were seen of late
