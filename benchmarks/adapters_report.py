"""The table and the plots of benchmarks.adapters."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, wherever it runs
import matplotlib.pyplot as plt

from loraplex_service.bench.records import percentile

NUM_RESAMPLES = 1000


def write_report(report: dict[str, Any], out: Path) -> None:
    """OUT.md and OUT.png."""
    parts = {name: part["found"] for name, part in report["parts"].items()}
    machine = report["machine"]
    lines = [
        f"# Adapters on {report['model']}, {report['date']}",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB. The engine in one process; ranks "
        "8, 16, 32 and 64 on q and v, as many of each, if nothing else is said.",
        "",
        *(f"    {part['command']}" for part in report["parts"].values()),
        "",
    ]
    writers = {"many": _many, "mixed": _mixed, "hot": _hot, "beside": _beside}
    for name, found in parts.items():
        lines += [*writers[name](found), ""]
    out.with_name(out.name + ".md").write_text("\n".join(lines).rstrip() + "\n")
    _draw(parts, out.with_name(out.name + ".png"))


def _rates(found: dict[str, Any]) -> dict[int, float]:
    """Output tokens per second of all runs with a number of adapters together."""
    return {
        int(count): sum(run["tokens"] for run in runs) / sum(run["seconds"] for run in runs)
        for count, runs in found["runs"].items()
    }


def _many(found: dict[str, Any]) -> list[str]:
    rates, few = _rates(found), found["runs"]["5"]
    lines = [
        "## Registered adapters",
        "",
        "32 callers, prompts and outputs of 8 to 512 tokens as in the traffic with which S-LoRA (arXiv 2311.03285) was "
        "measured from 5 to 2,000 adapters, adapters by Zipf's law (exponent 1). All are in host memory "
        f"({found['host_bytes'] / 1e9:.1f} GB, loaded in {found['load_seconds']:.0f} s), at most 256 on the device. "
        f"{len(few)} runs with each number, as long as all callers had work; a run has the same requests whatever the "
        "number, and the ranks change places in the order of popularity from run to run. In brackets the medians and "
        "the extremes of the runs one by one.",
        "",
        "| adapters | different ones in a run | output tokens/s | against 5 | median TTFT |",
        "|---|---|---|---|---|",
    ]
    for count, runs in found["runs"].items():
        rate = rates[int(count)]
        distinct = statistics.median(run["distinct"] for run in runs)
        ttft = statistics.median(run["ttft_p50_seconds"] for run in runs)
        pairs = zip(runs, few, strict=True)
        losses = [run["tokens"] / run["seconds"] / (less["tokens"] / less["seconds"]) - 1 for run, less in pairs]
        spread = f" ({statistics.median(losses):+.1%}; {min(losses):+.1%} to {max(losses):+.1%})" if runs != few else ""
        lines.append(
            f"| {count} | {distinct:.0f} | {rate:.0f} | {rate / rates[5] - 1:+.1%}{spread} | {1000 * ttft:.0f} ms |"
        )
    return lines


def _mixed(found: dict[str, Any]) -> list[str]:
    roofline = found["roofline"]
    lines = [
        "## Distinct adapters of mixed ranks",
        "",
        "8 callers, prompts of 128 and outputs of 64 tokens: of the base model, and of 8 adapters, two of each rank, "
        "in turns. Output tokens/s, medians of the runs. The limit is `benchmarks.roofline`'s, at the "
        f"{roofline['bytes_per_second'] / 1e9:.1f} GB/s and {roofline['flops_per_second'] / 1e9:.0f} GFLOP/s of this "
        "run; bytes alone are those of the base's weights over those of base and adapters.",
        "",
        "| adapters on | runs | adapters' weights | base | 8 adapters | of base (extremes) | limit | bytes alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in found["cells"].items():
        base, lora = ([run["output_tokens_per_second"] for run in cell["runs"][key]] for key in ("base", "lora8"))
        ratios = [mine / theirs for mine, theirs in zip(lora, base, strict=True)]
        limits, num_bytes = cell["limits"], cell["adapter_bytes"]
        bytes_alone = found["base_bytes"] / (found["base_bytes"] + num_bytes)
        lines.append(
            f"| {name} | {len(base)} | {num_bytes / 1e6:.0f} MB | {statistics.median(base):.0f} "
            f"| {statistics.median(lora):.0f} "
            f"| {statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%}) "
            f"| {limits['lora8'] / limits['base']:.1%} | {bytes_alone:.1%} |"
        )
    return lines


def _hot(found: dict[str, Any]) -> list[str]:
    slots = found["slots"]
    lines = [
        "## More hot adapters than the device holds",
        "",
        f"{slots} slots, prompts of 64 and outputs of 16 tokens, all adapters equally likely. A "
        "request of an adapter for which no slot is free waits until all requests of another one have ended; the last "
        "columns say how many did, and the median of what they waited.",
        "",
        f"| callers | TTFT p50, {slots} adapters | {2 * slots} adapters | ratio | p99 | p99 | tokens/s | tokens/s "
        "| waited for a slot | for |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for concurrency in sorted({int(cell.partition("/")[2]) for cell in found["cells"]}):
        fit, over = (found["cells"][f"{count}/{concurrency}"] for count in (slots, 2 * slots))
        p50, p99 = "ttft_p50_seconds", "ttft_p99_seconds"
        lines.append(
            f"| {concurrency} | {1000 * fit[p50]:.0f} ms | {1000 * over[p50]:.0f} ms | {over[p50] / fit[p50]:.2f} "
            f"| {1000 * fit[p99]:.0f} ms | {1000 * over[p99]:.0f} ms "
            f"| {fit['output_tokens_per_second']:.0f} | {over['output_tokens_per_second']:.0f} "
            f"| {over['waited_for_a_slot']:.0%} | {1000 * over['slot_wait_p50_seconds']:.0f} ms |"
        )
    return lines


def _beside(found: dict[str, Any]) -> list[str]:
    rounds = found["rounds"]
    lines = [
        "## Bad neighbours",
        "",
        f"{len(rounds)} rounds of all rows in random order, each with the same {len(rounds[0]['alone']['ttft_ms'])} "
        "requests of 8 resident adapters, 30 a second (Poisson), prompts of 32 and outputs of 4 tokens. Beside them "
        "somebody asks again and again for an adapter that is resident (one more caller, and nothing to load), cold, "
        "broken, on a disk that trickles, or huge (rank 512 on all linears). Percentiles of TTFT over the requests of "
        "all rounds; in brackets the 95 % interval of a bootstrap over rounds. ITL (between two tokens): medians of "
        "the rounds' percentiles. The last columns: how often the neighbour got an answer, and how long it waited "
        "(median).",
        "",
        "| neighbour | TTFT p50 | p90 | p99 | p50 against alone | p99 against alone | ITL p50 | ITL p99 "
        "| its answers | after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in rounds[0]:
        ttfts = _ttfts(rounds, arm)
        cells = [arm, *(f"{percentile(ttfts, share):.0f} ms" for share in (0.5, 0.9, 0.99))]
        cells += [_growth(rounds, arm, share) if arm != "alone" else "" for share in (0.5, 0.99)]
        cells += [f"{statistics.median(each[arm][f'itl_p{share}_ms'] for each in rounds):.0f} ms" for share in (50, 99)]
        own = [value for each in rounds for value in each[arm]["own_ms"]]
        cells += [str(len(own)), f"{statistics.median(own):.0f} ms"] if own else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ttfts(rounds: list[dict[str, Any]], arm: str) -> list[float]:
    """Of all requests, in milliseconds."""
    return [value for each in rounds for value in each[arm]["ttft_ms"]]


def _growth(rounds: list[dict[str, Any]], arm: str, share: float) -> str:
    """Of a percentile, against that of the rounds without a neighbour."""

    def of(chosen: list[dict[str, Any]]) -> float:
        return percentile(_ttfts(chosen, arm), share) / percentile(_ttfts(chosen, "alone"), share) - 1

    rng = random.Random(0)
    drawn = [of(rng.choices(rounds, k=len(rounds))) for _ in range(NUM_RESAMPLES)]
    return f"{of(rounds):+.1%} ({percentile(drawn, 0.025):+.0%} to {percentile(drawn, 0.975):+.0%})"


def _draw(parts: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(1, len(parts), figsize=(5 * len(parts), 3.6), squeeze=False)
    for axis, (name, found) in zip(axes[0], parts.items(), strict=True):
        if name == "many":
            rates = _rates(found)
            axis.semilogx(list(rates), list(rates.values()), marker="o")
            axis.set(xlabel="registered adapters", ylabel="output tokens/s", ylim=(0, None))
        elif name == "mixed":
            for key, label in (("base", "base model"), ("lora8", "8 adapters")):
                heights = [
                    statistics.median(run["output_tokens_per_second"] for run in cell["runs"][key])
                    for cell in found["cells"].values()
                ]
                axis.bar([f"{label},\n{targets}" for targets in found["cells"]], heights)
            axis.set(ylabel="output tokens/s, 8 callers")
        elif name == "hot":
            for count in (found["slots"], 2 * found["slots"]):
                cells = {int(k.partition("/")[2]): c for k, c in found["cells"].items() if k.startswith(f"{count}/")}
                ttfts = [1000 * cells[key]["ttft_p50_seconds"] for key in sorted(cells)]
                axis.plot(sorted(cells), ttfts, marker="o", label=f"{count} adapters, {found['slots']} slots")
            axis.set(xlabel="callers", ylabel="median TTFT (ms)", ylim=(0, None))
            axis.legend()
        else:
            arms = list(found["rounds"][0])
            for share in (0.99, 0.5):
                heights = [percentile(_ttfts(found["rounds"], arm), share) for arm in arms]
                axis.bar(arms, heights, label=f"p{100 * share:.0f}")
            axis.set(xlabel="neighbour", ylabel="TTFT of the others (ms)")
            axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
