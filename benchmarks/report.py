"""Tables and plots of a serving benchmark.

python -m benchmarks.report RESULT.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, wherever it runs
import matplotlib.pyplot as plt


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
        f"{report['roofline']['flops_per_second'] / 1e9:.0f} GFLOP/s; from these follows the limit.",
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
    """One row of bars per measure, one group per scenario and concurrency, one colour per system."""
    cells = [cell for cell in report["cells"] if cell["median"]]
    groups = list(dict.fromkeys((cell["scenario"], cell["concurrency"]) for cell in cells))
    systems = list(dict.fromkeys(cell["system"] for cell in cells))
    measures = [
        ("output_tokens_per_second", "output tokens/s", 1.0),
        ("ttft_p50_seconds", "TTFT p50, ms", 1e3),
        ("tpot_p50_seconds", "TPOT p50, ms", 1e3),
    ]
    figure, axes = plt.subplots(len(measures), 1, figsize=(max(6.0, 1.1 * len(groups) + 2), 9), sharex=True)
    width = 0.8 / max(1, len(systems))
    for axis, (key, label, factor) in zip(axes, measures, strict=True):
        for index, system in enumerate(systems):
            own = {(c["scenario"], c["concurrency"]): c for c in cells if c["system"] == system}
            positions = [i for i, group in enumerate(groups) if group in own]
            axis.bar(
                [position + (index - (len(systems) - 1) / 2) * width for position in positions],
                [own[groups[position]]["median"][key] * factor for position in positions],
                width,
                label=report["systems"][system]["system"],
            )
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[0].set_title(f"{report['model']}, {report['machine']['cores']} cores of {report['machine']['cpu']}")
    axes[-1].set_xticks(range(len(groups)), [f"{scenario}\n{streams} streams" for scenario, streams in groups])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a JSON file written by benchmarks.serving")
    args = parser.parse_args()
    write_report(json.loads(args.result.read_text()), args.result.with_suffix(""))


if __name__ == "__main__":
    main()
