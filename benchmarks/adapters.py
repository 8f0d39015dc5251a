"""Many adapters, mixed ranks, more hot adapters than the device holds, and bad neighbours: what each costs the others.

    python -m benchmarks.adapters --model DIR/llama-160m --out RESULT [--parts many mixed hot beside] [--more]

DIR is made by benchmarks.models. Adapters of ranks 8 to 64 on q and v, in one part also on all linears, are written to
a temporary directory. The engine runs in this process; its configuration is what `Setup` says, all else is default.
Writes RESULT.json, .md and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.adapters_engine import ALL_TARGETS, RANKS, Bench, Setup, write_weights
from benchmarks.adapters_report import write_report
from benchmarks.measure import machine, while_saturated
from benchmarks.roofline import BF16_BYTES, ModelCost, measure, output_limit
from benchmarks.workload import FIRST_TOKEN_ID, SCENARIOS, SEED, VOCAB, Work
from benchmarks.workload import make_work as scenario_work
from loraplex_adapters.files.source import CONFIG_FILE, WEIGHTS_FILE, digest
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.pace import Rest
from loraplex_engine.link.messages import WantAdapter
from loraplex_service.bench.records import percentile, summarise

COUNTS = (5, 50, 500, 2000)
LENGTHS = (8, 512)  # tokens of prompts and of outputs: those of S-LoRA (arXiv 2311.03285) at 5 and at 2,000 adapters
ZIPF = 1.0
MANY_REQUESTS = 96
MANY_REPEATS = 2 * len(RANKS)
MIXED_STREAMS = 8  # and adapters, two of each rank
MIXED_REPEATS = 10
HOT_REQUESTS = 256

# Beside a neighbour: Poisson arrivals, so that the phase of a step in which one falls is left to chance. Callers that
# wait for each other's steps fall into step, and then a percentile says which of two multiples of a step they hit.
RUN_SECONDS = 250.0  # of rounds, each of which has all arms
ROUND_SECONDS = 2.7  # of an arm's arrivals
ARRIVALS_PER_SECOND = 30.0
NEIGHBOUR_PAUSE_SECONDS = 0.1
HUGE_RANK = 512
TRICKLE_SECONDS = 0.01  # for each piece of 256 KiB, and each tensor


def make_work(
    name: str, adapters: Sequence[int], zipf: float, count: int, prompt: tuple[int, int], output: tuple[int, int]
) -> list[Work]:
    """Requests whose prompts and outputs have from … to … tokens: the same ones whatever the adapters."""
    tokens, chooser = random.Random(f"{SEED}/{name}"), random.Random(f"{SEED}/{name}/adapters")
    weights = [1 / (1 + place) ** zipf for place in range(len(adapters))]
    return [
        Work(
            [tokens.randrange(FIRST_TOKEN_ID, VOCAB) for _ in range(tokens.randint(*prompt))],
            tokens.randint(*output),
            chosen,
        )
        for chosen in chooser.choices(adapters, weights, k=count)
    ]


# ---- the parts -------------------------------------------------------------------------------------------------------


def many(model: Path, threads: int, root: Path, before: object) -> dict[str, Any]:
    """Throughput over the number of adapters that requests choose from, all of them in host memory."""
    bench = Bench(model, Setup(COUNTS[-1]), threads, root)
    load_seconds = bench.load_all()
    bench.run(make_work("warm", range(5), ZIPF, 32, (64, 64), (8, 8)), 32)
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for repeat in range(MANY_REPEATS):
        for count in COUNTS if repeat % 2 == 0 else reversed(COUNTS):
            adapters = by_popularity(count, repeat)
            work = make_work(f"many/{repeat}", adapters, ZIPF, MANY_REQUESTS, LENGTHS, LENGTHS)
            records = bench.run(work, 32)
            tokens, seconds = while_saturated(records)
            runs[count].append(
                {
                    "tokens": tokens,
                    "seconds": seconds,
                    "ttft_p50_seconds": percentile((record.ttft for record in records), 0.5),
                    "distinct": len({item.adapter for item in work}),
                }
            )
    bench.close()
    return {"load_seconds": load_seconds, "host_bytes": bench.core.store.used_bytes, "runs": runs}


def by_popularity(count: int, repeat: int) -> list[int]:
    """`count` adapters, the most popular first. Over len(RANKS) repeats, each place has each rank equally often: the
    popular ones, which are nearly all of the traffic if there are few, are no smaller than the others."""
    ranks = len(RANKS)
    return [place // ranks * ranks + (place + repeat) % ranks for place in range(count)]


def mixed(model: Path, threads: int, root: Path, before: object) -> dict[str, Any]:
    """Throughput of distinct adapters of mixed ranks against that of the base model, in turns."""
    scenarios = [SCENARIOS[name] for name in ("base", "lora8")]
    roofline, cost = measure(threads), ModelCost.read(model)
    cells = {}
    for name, targets in (("q and v", ("q_proj", "v_proj")), ("all linears", ALL_TARGETS)):
        folder = root / name
        folder.mkdir()
        bench = Bench(model, Setup(MIXED_STREAMS, targets=targets), threads, folder)
        bench.load_all()
        bench.run(scenario_work(SCENARIOS["lora8"], MIXED_STREAMS, -1), MIXED_STREAMS)
        runs: dict[str, list[dict[str, float]]] = {scenario.name: [] for scenario in scenarios}
        for repeat in range(MIXED_REPEATS):
            for scenario in scenarios if repeat % 2 == 0 else reversed(scenarios):
                work = scenario_work(scenario, MIXED_STREAMS, repeat)
                runs[scenario.name].append(summarise(bench.run(work, MIXED_STREAMS)))
        num_bytes = bench.core.store.used_bytes
        bench.close()
        own = cost.with_adapters(num_bytes // BF16_BYTES // MIXED_STREAMS)
        limits = {scenario.name: output_limit(own, roofline, scenario, MIXED_STREAMS) for scenario in scenarios}
        cells[name] = {"adapter_bytes": num_bytes, "limits": limits, "runs": runs}
    base_bytes = int(BF16_BYTES * cost.of_step(MIXED_STREAMS, 0))
    return {"roofline": asdict(roofline), "base_bytes": base_bytes, "cells": cells}


def hot(model: Path, threads: int, root: Path, before: object) -> dict[str, Any]:
    """Time to first token with as many and with twice as many hot adapters as the device holds."""
    slots = 16
    bench = Bench(model, Setup(2 * slots, max_resident=slots), threads, root)
    bench.load_all()
    cells = {}
    for concurrency in (8, 16, 32):
        for count in (slots, 2 * slots):
            bench.run(make_work("warm", range(count), 0.0, 32, (64, 64), (4, 4)), concurrency)
            bench.slot_waits.clear()
            records = bench.run(
                make_work(f"hot/{count}", range(count), 0.0, HOT_REQUESTS, (64, 64), (16, 16)), concurrency
            )
            waits = {
                "waited_for_a_slot": len(bench.slot_waits) / HOT_REQUESTS,
                "slot_wait_p50_seconds": percentile(bench.slot_waits or [0.0], 0.5),
            }
            cells[f"{count}/{concurrency}"] = summarise(records) | waits
    bench.close()
    return {"slots": slots, "cells": cells}


def beside(model: Path, threads: int, root: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """What well-behaved requests wait for tokens, alone and beside each kind of neighbour: the arms of a round take
    turns and get the same arrivals. Further rounds to those of a run before, if there was one."""
    bench = Bench(model, Setup(64, max_rank=HUGE_RANK), threads, root)
    for index in range(8):
        bench.core.want_adapter(WantAdapter(bench.keys[index], 1, str(bench.paths[index])))
    _make_bad(bench)
    bench.run(make_work("warm", range(8), 0.0, 64, (64, 64), (4, 4)), 8)
    rounds: list[dict[str, Any]] = before["rounds"] if before else []
    count = int(ROUND_SECONDS * ARRIVALS_PER_SECOND)
    until = time.perf_counter() + RUN_SECONDS
    while time.perf_counter() < until:
        number = len(rounds)
        work = make_work(f"bad/{number}", range(8), 0.0, count, (32, 32), (4, 4))
        arms = list(ARMS)
        random.Random(number).shuffle(arms)
        found = {arm: _one_arm(bench, arm, work, number) for arm in arms}
        rounds.append({arm: found[arm] for arm in ARMS})
    bench.close()
    return {"rounds": rounds}


def _one_arm(bench: Bench, arm: str, work: Sequence[Work], seed: int) -> dict[str, Any]:
    own: list[float] = []

    async def neighbour(callers: asyncio.Future[Any]) -> None:
        """Asks for an adapter, gives it back, asks again."""
        for index in itertools.cycle(random.Random(seed).sample(ARMS[arm], len(ARMS[arm]))):
            key, path = bench.keys[index], bench.paths[index]
            asked = time.perf_counter()
            bench.core.want_adapter(WantAdapter(key, 1, str(path)))
            request = asyncio.ensure_future(bench.request(Work([300] * 8, 1, index), lambda count: None))
            await asyncio.wait({request, callers}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                own.append(time.perf_counter() - asked)
            if arm != "resident":
                bench.core.pool.unload(key)  # cold again for the next one
                bench.core.store.unregister(key)
            await asyncio.wait({callers}, timeout=NEIGHBOUR_PAUSE_SECONDS)
            if callers.done():
                return

    records = bench.run_open(work, ARRIVALS_PER_SECOND, seed, neighbour if ARMS[arm] else None)
    while bench.core.store.is_loading():  # what the neighbour has left behind is none of the next arm's
        bench.core.step()
        time.sleep(0.002)
    gaps = [after - before for record in records for (before, _), (after, _) in pairwise(record.arrivals)]
    return {
        "ttft_ms": sorted(round(1000 * record.ttft, 1) for record in records),
        "itl_p50_ms": round(1000 * percentile(gaps, 0.5), 1),
        "itl_p99_ms": round(1000 * percentile(gaps, 0.99), 1),
        "own_ms": [round(1000 * seconds) for seconds in own],
    }


def _make_bad(bench: Bench) -> None:
    broken, huge, slow = (bench.paths[ARMS[arm][0]] for arm in ("broken", "huge", "slow"))
    for path in (broken, huge):
        (path / WEIGHTS_FILE).unlink()
    (broken / WEIGHTS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    write_weights(bench.shape, HUGE_RANK, 1, ALL_TARGETS, huge / WEIGHTS_FILE)
    (huge / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": HUGE_RANK, "lora_alpha": HUGE_RANK}))
    bench.keys[ARMS["huge"][0]] = AdapterKey("shared/huge", digest(huge))
    load = bench.core.store._load

    def trickle(key: AdapterKey, path: Path, rest: Rest, is_hashed: bool) -> Any:
        def wait() -> None:
            rest()
            time.sleep(TRICKLE_SECONDS)

        return load(key, path, rest=wait if path == slow else rest, is_hashed=is_hashed)

    bench.core.store._load = trickle  # type: ignore[assignment]  # there is no slow disk to be had


# What the neighbour asks for. A resident adapter is the yardstick: one more caller, and nothing to load.
ARMS: dict[str, Sequence[int]] = {
    "alone": (),
    "resident": range(8),
    "cold": range(8, 60),
    "broken": [60],
    "slow": [63],
    "huge": [61],
}
PARTS: dict[str, Callable[[Path, int, Path, dict[str, Any] | None], dict[str, Any]]] = {
    "many": many,
    "mixed": mixed,
    "hot": hot,
    "beside": beside,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--more", action="store_true", help="add rounds beside neighbours to those of OUT.json")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    file = args.out.with_name(args.out.name + ".json")
    report = json.loads(file.read_text()) if file.exists() else {"parts": {}}
    report["parts"] = {name: part for name, part in report["parts"].items() if name in PARTS}
    report |= {"date": time.strftime("%Y-%m-%d"), "model": args.model.name, "machine": machine()}
    for part in args.parts:
        root = Path(tempfile.mkdtemp(prefix="loraplex-adapters-"))
        try:
            before = report["parts"].get(part) if args.more else None
            found = PARTS[part](args.model, args.threads, root, before and before["found"])
        finally:
            shutil.rmtree(root)
        command = f"python -m benchmarks.adapters --model DIR/{args.model.name} --out OUT --parts {part}"
        if args.more:
            command += " --more"
        report["parts"][part] = {"command": command, "found": found}
        compact = re.sub(r"\[[\d\s.,]+\]", lambda numbers: "".join(numbers[0].split()), json.dumps(report, indent=1))
        file.write_text(compact + "\n")
    write_report(json.loads(file.read_text()), args.out)


if __name__ == "__main__":
    main()
