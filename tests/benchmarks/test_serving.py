"""`benchmarks.serving` and `loraplex bench` tell the same figures of the same requests."""

import json
import random
import sys
from pathlib import Path

from benchmarks.serving import System
from loraplex_service.bench.records import TPOT_LIMIT_SECONDS, TTFT_LIMIT_SECONDS, Record, summarise_traffic
from loraplex_service.bench.runs import summarise_all

# A system under test, as benchmarks/worker.py has it speak: it tells the records of a file.
SYSTEM = """
import sys
print("{}", flush=True)
for line in sys.stdin:
    print(open(sys.argv[1]).read(), flush=True)
"""


def drawn_records(count: int) -> list[Record]:
    """Requests of many lengths, whose tokens come one or several at a time."""
    rng = random.Random(7)
    records = []
    for _ in range(count):
        sent = moment = rng.uniform(0, 20)
        arrivals = []
        for _ in range(rng.randint(1, 60)):
            moment += rng.expovariate(12)
            arrivals.append((moment, rng.randint(1, 3)))
        records.append(Record(sent, rng.randint(1, 300), sum(count for _, count in arrivals), arrivals))
    return records


def test_both_benchmarks_tell_the_same_of_the_same_records(tmp_path: Path) -> None:
    records = drawn_records(101)
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({"records": [vars(record) for record in records]}))
    system = System("told", [sys.executable, "-c", SYSTEM, str(answer)], tmp_path / "log")
    try:
        told = system.run([], 8, summarise_traffic)
    finally:
        system.stop()
    of_bench = summarise_all(records, TTFT_LIMIT_SECONDS, TPOT_LIMIT_SECONDS)
    both = told.keys() & of_bench.keys()
    percentiles = {f"{name}_p{share}_seconds" for name in ("ttft", "tpot") for share in (50, 90, 99)}
    assert both >= percentiles | {"output_tokens_per_second", "total_tokens_per_second", "share_in_time"}
    assert {name: told[name] for name in both} == {name: of_bench[name] for name in both}
