"""The table and the plots of benchmarks.adapters."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, wherever it runs
import matplotlib.pyplot as plt

from benchmarks.measure import percentile


def write_report(report: dict[str, Any], out: Path) -> None:
    """OUT.md and OUT.png."""
    parts = {name: part["found"] for name, part in report["parts"].items()}
    machine = report["machine"]
    lines = [
        f"# Adapters on {report['model']}, {report['date']}",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB. The engine in one process; ranks "
        "8, 16, 32 and 64 on q and v, as many of each.",
        "",
        *(f"    {part['command']}" for part in report["parts"].values()),
        "",
    ]
    cases = {name: found for name, found in parts.items() if "rounds" in found}
    plots = {name: found for name, found in parts.items() if name not in cases} | ({"beside": cases} if cases else {})
    writers = {"many": _many, "hot": _hot, "beside": _beside}
    for name, found in plots.items():
        lines += [*writers[name](found), ""]
    out.with_name(out.name + ".md").write_text("\n".join(lines).rstrip() + "\n")
    _draw(plots, out.with_name(out.name + ".png"))


def _rates(found: dict[str, Any]) -> dict[int, float]:
    return {
        int(count): statistics.median(run["output_tokens_per_second"] for run in runs)
        for count, runs in found["runs"].items()
    }


def _many(found: dict[str, Any]) -> list[str]:
    rates = _rates(found)
    lines = [
        "## Registered adapters",
        "",
        "32 callers, prompts of 64 and outputs of 32 tokens, adapters by Zipf's law (exponent 1), all in host memory "
        f"({found['host_bytes'] / 1e9:.1f} GB, loaded in {found['load_seconds']:.0f} s), at most 256 on the device. "
        "Medians of three.",
        "",
        "| adapters | different ones in 96 requests | output tokens/s | against 5 | median TTFT |",
        "|---|---|---|---|---|",
    ]
    for count, runs in found["runs"].items():
        rate = rates[int(count)]
        distinct = statistics.median(run["distinct"] for run in runs)
        ttft = statistics.median(run["ttft_p50_seconds"] for run in runs)
        lines.append(f"| {count} | {distinct:.0f} | {rate:.0f} | {rate / rates[5] - 1:+.1%} | {1000 * ttft:.0f} ms |")
    return lines


def _hot(found: dict[str, Any]) -> list[str]:
    slots = found["slots"]
    lines = [
        "## More hot adapters than the device holds",
        "",
        f"{slots} slots, prompts of 64 and outputs of 16 tokens, all adapters equally likely.",
        "",
        f"| callers | TTFT p50, {slots} adapters | {2 * slots} adapters | ratio | p99 | p99 | tokens/s | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for concurrency in sorted({int(cell.partition("/")[2]) for cell in found["cells"]}):
        fit, over = (found["cells"][f"{count}/{concurrency}"] for count in (slots, 2 * slots))
        p50, p99 = "ttft_p50_seconds", "ttft_p99_seconds"
        lines.append(
            f"| {concurrency} | {1000 * fit[p50]:.0f} ms | {1000 * over[p50]:.0f} ms | {over[p50] / fit[p50]:.2f} "
            f"| {1000 * fit[p99]:.0f} ms | {1000 * over[p99]:.0f} ms "
            f"| {fit['output_tokens_per_second']:.0f} | {over['output_tokens_per_second']:.0f} |"
        )
    return lines


def _beside(cases: dict[str, Any]) -> list[str]:
    lines = [
        "## Bad neighbours",
        "",
        "Requests of 8 resident adapters, 30 a second (Poisson), prompts of 32 and outputs of 4 tokens. Beside them "
        "somebody asks again and again for an adapter that is cold, broken, huge (rank 256 on q, k, v and o) or on a "
        "disk that takes 5 s; a neighbour with a resident adapter is one more caller and loads nothing. Rounds with "
        "and without the neighbour take turns, on the same arrivals. Medians of the rounds; in brackets the middle "
        "half of them. The last column is the middle half of the differences within a round.",
        "",
        "| neighbour | its requests | requests | p50 alone | beside | p90 alone | beside | p99 alone | beside "
        "| p99 against alone | by round |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in cases.items():
        rounds = found["rounds"]
        cells = [name, str(found["neighbour_requests"]), f"2 × {found['requests']}"]
        for share in (50, 90, 99):
            cells += [_median_and_middle(_ttfts(rounds, arm, share)) for arm in ("alone", "beside")]
        alone, beside = _ttfts(rounds, "alone", 99), _ttfts(rounds, "beside", 99)
        growths = [after / before - 1 for before, after in zip(alone, beside, strict=True)]
        cells.append(f"{statistics.median(beside) / statistics.median(alone) - 1:+.1%}")
        cells.append(f"{percentile(growths, 0.25):+.0%} to {percentile(growths, 0.75):+.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ttfts(rounds: list[dict[str, dict[str, float]]], arm: str, share: int) -> list[float]:
    """A percentile of each round, in milliseconds."""
    return [1000 * found[arm][f"ttft_p{share}_seconds"] for found in rounds]


def _median_and_middle(values: list[float]) -> str:
    low, high = percentile(values, 0.25), percentile(values, 0.75)
    return f"{statistics.median(values):.0f} ms ({low:.0f}–{high:.0f})"


def _draw(parts: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(1, len(parts), figsize=(5 * len(parts), 3.6), squeeze=False)
    for axis, (name, found) in zip(axes[0], parts.items(), strict=True):
        if name == "many":
            rates = _rates(found)
            axis.semilogx(list(rates), list(rates.values()), marker="o")
            axis.set(xlabel="registered adapters", ylabel="output tokens/s", ylim=(0, None))
        elif name == "hot":
            for count in (found["slots"], 2 * found["slots"]):
                cells = {int(k.partition("/")[2]): c for k, c in found["cells"].items() if k.startswith(f"{count}/")}
                ttfts = [1000 * cells[key]["ttft_p50_seconds"] for key in sorted(cells)]
                axis.plot(sorted(cells), ttfts, marker="o", label=f"{count} adapters, {found['slots']} slots")
            axis.set(xlabel="callers", ylabel="median TTFT (ms)", ylim=(0, None))
            axis.legend()
        else:
            for offset, arm in ((-0.2, "alone"), (0.2, "beside")):
                heights = [statistics.median(_ttfts(case["rounds"], arm, 99)) for case in found.values()]
                axis.bar([index + offset for index in range(len(found))], heights, 0.4, label=arm)
            axis.set_xticks(range(len(found)), list(found))
            axis.set(xlabel="neighbour", ylabel="p99 TTFT of the others (ms)")
            axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
