"""What a rank says of itself when it has loaded its share."""

import msgspec


class RankReady(msgspec.Struct, frozen=True):
    """The end of a rank's load."""

    problem: str = ""  # why it could not; "": it could
    weight_bytes: int = 0
    free_bytes: int = 0  # of its device


def loaded_note(rank: int) -> str:
    """The name of the note with it."""
    return f"loaded/{rank}"
