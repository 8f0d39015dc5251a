"""`python -m loraplex_engine --bus ADDRESS`: one engine process.

The first line of its stdin is its EngineConfig, as JSON. It ends on Shutdown, and when its parent is gone: the end of
its stdin says so. SIGINT, SIGHUP and SIGTERM are ignored: what stops a group reaches all of its processes, and the
service decides what becomes of the requests.
"""

import argparse
import os
import sys

import msgspec

from loraplex_engine.link.bus import EngineBus
from loraplex_engine.link.child import begin_child, limit_threads
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.load_report import LoadReport
from loraplex_engine.link.logs import LOG_FORMATS, set_up_logging
from loraplex_engine.link.machines import Meeting
from loraplex_engine.process import Core, run_engine


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loraplex_engine", description="One engine process. Its service starts it."
    )
    parser.add_argument("--bus", required=True, metavar="ADDRESS", help="where the service listens: ipc://…")
    parser.add_argument("--name", default="", help="of the model, for the log")
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--log-format", default="text", choices=LOG_FORMATS)
    parser.add_argument("--machines-listen", metavar="HOST:PORT", help="where the other machines of the model come")
    parser.add_argument("--machines-secret", metavar="FILE", help="what they know this one by")
    arguments = parser.parse_args()
    process = f"engine[{arguments.name}:{os.getpid()}]"
    set_up_logging(arguments.log_level, arguments.log_format, process)
    config_json = begin_child()

    with EngineBus(arguments.bus) as bus:

        def load(report: LoadReport) -> Core:
            listen, secret = arguments.machines_listen, arguments.machines_secret
            return load_core(config_json, report, bus, Meeting.at(listen, secret) if listen else None)

        status = run_engine(load, bus)
    sys.exit(status)


def load_core(config_json: bytes, report: LoadReport, bus: EngineBus, meeting: Meeting | None = None) -> Core:
    """Load the model where the service says. `meeting`: where its other machines come.

    Raises msgspec.MsgspecError or ValueError for a bad configuration, and whatever loading raises."""
    config = msgspec.json.decode(config_json, type=EngineConfig)
    config.check()
    limit_threads(config.rank_threads, os.environ)
    from loraplex_engine.core import EngineCore  # not earlier: torch reads those settings when it is imported
    from loraplex_engine.placing import placed

    return EngineCore.load(placed(config, bus, report), report, meeting)


if __name__ == "__main__":
    main()
