"""`python -m loraplex_engine.following --rank N`: a rank of a model that others compute with it.

The first line of its stdin is its Assignment, as JSON. It ends with its parent: the first rank, or the machine that
follows.
"""

import argparse
import logging
import os
import sys

import msgspec

from loraplex_engine.following.starting import Assignment
from loraplex_engine.link.child import begin_child, limit_threads
from loraplex_engine.link.logs import LOG_FORMATS, set_up_logging

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loraplex_engine.following", description="One rank of a model. Its machine starts it."
    )
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--name", default="", help="of the model, for the log")
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--log-format", default="text", choices=LOG_FORMATS)
    arguments = parser.parse_args()
    set_up_logging(
        arguments.log_level, arguments.log_format, f"engine[{arguments.name}:{os.getpid()}:{arguments.rank}]"
    )
    assignment = msgspec.json.decode(begin_child(), type=Assignment)
    limit_threads(assignment.config.rank_threads, os.environ)
    from loraplex_engine.following.follower import follow  # not earlier: torch reads those settings

    try:
        follow(assignment)
    except Exception as error:
        known = isinstance(error, ValueError | OSError)
        logger.error("rank %d ends: %s", arguments.rank, error, exc_info=not known)
        sys.exit(1)


if __name__ == "__main__":
    main()
