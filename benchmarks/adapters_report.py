"""The table and the plots of benchmarks.adapters."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, wherever it runs
import matplotlib.pyplot as plt


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
    writers = {"many": _many, "hot": _hot, "bad": _bad}
    for name, found in parts.items():
        lines += [*writers[name](found), ""]
    out.with_name(out.name + ".md").write_text("\n".join(lines).rstrip() + "\n")
    _draw(parts, out.with_name(out.name + ".png"))


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


def _bad(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Bad neighbours",
        "",
        "8 callers of 8 resident adapters, prompts of 64 and outputs of 12 tokens, 240 requests. Beside them somebody "
        "asks again and again for an adapter that is cold, broken, huge (rank 256) or on a disk that takes 5 s.",
        "",
        "| neighbour | TTFT p50 | TTFT p99 | p99 against alone |",
        "|---|---|---|---|",
    ]
    alone = found["alone"]["ttft_p99_seconds"]
    for name, figures in found.items():
        p50, p99 = figures["ttft_p50_seconds"], figures["ttft_p99_seconds"]
        lines.append(f"| {name} | {1000 * p50:.1f} ms | {1000 * p99:.1f} ms | {p99 / alone - 1:+.1%} |")
    return lines


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
            axis.bar(list(found), [1000 * figures["ttft_p99_seconds"] for figures in found.values()])
            axis.set(xlabel="neighbour", ylabel="p99 TTFT of the others (ms)")
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
