"""`python -m tests.faults.server FUSE serve --config FILE`: the true server, which leaks while a file FUSE says "leak".

Production has no such hook: this replaces parts of the service and of its engines from outside.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from loraplex_service import cli
from loraplex_service.app import running
from loraplex_service.commands import servers
from loraplex_service.requests import inference
from loraplex_service.requests.run import Run
from tests.faults.engine import LEAK_BYTES, Fuse, engines_with

KEPT: Final[list[bytes]] = []


class LeakingRun(Run):
    """Keeps something of each generation."""

    fuse: Fuse

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.fuse.glows():
            KEPT.append(b"x" * LEAK_BYTES)


def main() -> None:
    fuse = Path(sys.argv.pop(1))
    LeakingRun.fuse = Fuse(fuse)
    # Each module imports its name for itself. Unlike an assignment, this ends where a module has no such name.
    patch.object(inference, "Run", LeakingRun).start()
    patch.object(servers, "running", partial(running, launch_for=engines_with(fuse))).start()
    cli.main()


if __name__ == "__main__":
    main()
