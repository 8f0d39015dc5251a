"""Tables and plots of a serving benchmark.

python -m benchmarks.report RESULT.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, wherever it runs
import matplotlib.pyplot as plt

from benchmarks.workload import SCENARIOS


def write_report(report: dict[str, Any], out: Path) -> None:
    """OUT.md with a table, OUT.png with the plots."""
    out.with_name(out.name + ".md").write_text(as_markdown(report, out.name))
    draw(report, out.with_name(out.name + ".png"))


def as_markdown(report: dict[str, Any], name: str) -> str:
    machine = report["machine"]
    lines = [
        f"# {report['model']}, {report['date']}",
        "",
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['instruction_sets'])}), "
        f"{machine['memory_gib']} GiB. Measured in the same run with {report['roofline']['threads']} threads: reads "
        f"{report['roofline']['bytes_per_second'] / 1e9:.1f} GB/s, multiplies "
        f"{report['roofline']['flops_per_second'] / 1e9:.0f} GFLOP/s; from these follows the limit, for weights "
        "of 16 bits.",
        "",
        f"    {report['command']}",
        "",
        f"![throughput and latency]({name}.png)",
        "",
        "Medians of the repeats; the range of the throughput in brackets. Latencies are medians (99th percentiles).",
        "",
        "| scenario | streams | system | output tokens/s | % of limit | TTFT ms | TPOT ms | memory MiB | quiet |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in report["cells"]:
        median = cell["median"]
        head = f"| {cell['scenario']} | {cell['concurrency']} | {system_name(report, cell)} |"
        if median is None:
            lines.append(f"{head} failed: {cell['repeats'][-1]['error']} | | | | | |")
            continue
        lines.append(
            f"{head} {median['output_tokens_per_second']:.0f} "
            f"[{median['output_tokens_per_second_min']:.0f}, {median['output_tokens_per_second_max']:.0f}] "
            f"| {100 * median['output_tokens_per_second'] / cell['limit']:.0f} "
            f"| {median['ttft_p50_seconds'] * 1e3:.0f} ({median['ttft_p99_seconds'] * 1e3:.0f}) "
            f"| {median['tpot_p50_seconds'] * 1e3:.1f} ({median['tpot_p99_seconds'] * 1e3:.1f}) "
            f"| {median['memory_bytes'] / 2**20:.0f} | {cell['uncontended_repeats']} of {len(cell['repeats'])} |"
        )
    return "\n".join(lines) + "\n"


def system_name(report: dict[str, Any], cell: dict[str, Any]) -> str:
    return str(report["systems"][cell["system"]]["system"])


def draw(report: dict[str, Any], path: Path) -> None:
    """Throughput over streams and over adapters, latency percentiles, and the share of the limit; a line per system."""
    cells = [cell for cell in report["cells"] if cell["median"]]
    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    colours = {name: f"C{index}" for index, name in enumerate(report["systems"])}

    def lines(axis: Any, x: str, key: str, style: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        for name, colour in colours.items():
            points = sorted((c[x], c["median"][key]) for c in cells if c["system"] == name and wanted(c))
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=report["systems"][name]["system"])

    plain = [c for c in cells if not SCENARIOS[c["scenario"]].shared_prefix]
    streams_with = Counter(adapters for adapters, _ in {(c["adapters"], c["concurrency"]) for c in plain})
    most = max(streams_with, key=lambda adapters: (streams_with[adapters], adapters))  # where there is a line to draw
    streams = sorted({c["concurrency"] for c in plain})
    middle = streams[len(streams) // 2]

    def is_mixed(cell: dict[str, Any]) -> bool:
        return cell in plain and cell["adapters"] == most

    lines(axes[0, 0], "concurrency", "output_tokens_per_second", "o-", is_mixed)
    axes[0, 0].set(xlabel="streams", ylabel="output tokens/s", title=f"{most} adapters")
    lines(axes[0, 1], "adapters", "output_tokens_per_second", "o-", lambda c: c in plain and c["concurrency"] == middle)
    axes[0, 1].set(xlabel="adapters (0: base model)", ylabel="output tokens/s", title=f"{middle} streams")
    lines(axes[1, 0], "concurrency", "ttft_p50_seconds", "o-", is_mixed)
    lines(axes[1, 0], "concurrency", "ttft_p99_seconds", "o:", is_mixed)
    axes[1, 0].set(xlabel="streams", ylabel="TTFT, s", title=f"{most} adapters, p50 solid, p99 dotted")
    draw_shares(axes[1, 1], cells, colours)
    axes[0, 1].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    machine = report["machine"]
    figure.suptitle(f"{report['model']}, {machine['cores']} cores of {machine['cpu']}, {report['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_shares(axis: Any, cells: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Bars of the share of the limit, one group per scenario and number of streams."""
    groups = list(dict.fromkeys((cell["scenario"], cell["concurrency"]) for cell in cells))
    width = 0.8 / max(1, len(colours))
    for index, (name, colour) in enumerate(colours.items()):
        own = {(c["scenario"], c["concurrency"]): c for c in cells if c["system"] == name}
        positions = [i for i, group in enumerate(groups) if group in own]
        shares = [own[groups[i]]["median"]["output_tokens_per_second"] / own[groups[i]]["limit"] for i in positions]
        offset = (index - (len(colours) - 1) / 2) * width
        axis.bar([i + offset for i in positions], [100 * share for share in shares], width, color=colour)
    axis.set(ylabel="% of limit", title="share of what the machine could do")
    axis.set_xticks(range(len(groups)), [f"{scenario} {streams}" for scenario, streams in groups], rotation=60)
    axis.tick_params(axis="x", labelsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a JSON file written by benchmarks.serving")
    args = parser.parse_args()
    write_report(json.loads(args.result.read_text()), args.result.with_suffix(""))


if __name__ == "__main__":
    main()
