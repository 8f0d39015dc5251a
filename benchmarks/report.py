"""Tables and plots of a serving benchmark.

python -m benchmarks.report RESULT.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, wherever it runs
import matplotlib.pyplot as plt

from benchmarks.workload import SCENARIOS, TEMPERATURE, TOP_P
from loraplex_service.bench.records import TPOT_LIMIT_SECONDS, TTFT_LIMIT_SECONDS

CLOSED = "scenario|streams|system|output tokens/s|% of limit|TTFT ms|TPOT ms|memory MiB|quiet"
OPEN = "traffic|requests/s|system|in time %|in time, requests/s|output tokens/s|TTFT ms|TPOT ms|memory MiB|quiet"
TRAFFIC_NOTE = (
    f"Requests that come by themselves, sampled (temperature {TEMPERATURE}, top_p {TOP_P}). In time is one whose first "
    f"token came within {TTFT_LIMIT_SECONDS:g} s, and each other, on average, within {1e3 * TPOT_LIMIT_SECONDS:g} ms."
)


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
    ]
    closed, traffic = (
        [cell for cell in report["cells"] if ("traffic" in cell) is is_traffic] for is_traffic in (False, True)
    )
    if closed:
        lines += ["", *table(CLOSED, [closed_row(report, cell) for cell in closed])]
    if traffic:
        lines += ["", TRAFFIC_NOTE, "", *table(OPEN, [traffic_row(report, cell) for cell in traffic])]
    return "\n".join(lines) + "\n"


def table(columns: str, rows: Sequence[Sequence[str]]) -> list[str]:
    names = columns.split("|")
    head, *lines = [f"| {' | '.join(row)}{' |' * (len(names) - len(row))} |" for row in (names, *rows)]
    return [head, "|" + "---|" * len(names), *lines]


def closed_row(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    median = cell["median"]
    head = [cell["scenario"], str(cell["concurrency"]), system_name(report, cell)]
    if median is None:
        return [*head, f"failed: {cell['repeats'][-1]['error']}"]
    share = median["output_tokens_per_second"] / cell["limit"]
    return [*head, throughput(median), f"{100 * share:.0f}", *latencies(cell)]


def traffic_row(report: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    median = cell["median"]
    head = [cell["traffic"], f"{cell['requests_per_second']:g}", system_name(report, cell)]
    if median is None:
        return [*head, f"failed: {cell['repeats'][-1]['error']}"]
    in_time = [f"{100 * median['share_in_time']:.0f}", f"{median['requests_in_time_per_second']:.2f}"]
    return [*head, *in_time, throughput(median), *latencies(cell)]


def throughput(median: dict[str, float]) -> str:
    low, high = median["output_tokens_per_second_min"], median["output_tokens_per_second_max"]
    return f"{median['output_tokens_per_second']:.0f} [{low:.0f}, {high:.0f}]"


def latencies(cell: dict[str, Any]) -> list[str]:
    median = cell["median"]
    return [
        f"{median['ttft_p50_seconds'] * 1e3:.0f} ({median['ttft_p99_seconds'] * 1e3:.0f})",
        f"{median['tpot_p50_seconds'] * 1e3:.1f} ({median['tpot_p99_seconds'] * 1e3:.1f})",
        f"{median['memory_bytes'] / 2**20:.0f}",
        f"{cell['uncontended_repeats']} of {len(cell['repeats'])}",
    ]


def system_name(report: dict[str, Any], cell: dict[str, Any]) -> str:
    return str(report["systems"][cell["system"]]["system"])


def of_adapters(count: int) -> str:
    return f"{count} adapters" if count else "the base model"


def draw(report: dict[str, Any], path: Path) -> None:
    """What there are cells for: throughput over streams and over adapters, time to the first token, the share of the
    limit; and of traffic the share in time and the time to the first token over the rate. A line per system.
    """
    cells = [cell for cell in report["cells"] if cell["median"]]
    colours = {name: f"C{index}" for index, name in enumerate(report["systems"])}

    def lines(axis: Any, x: str, key: str, style: str, of: Sequence[dict[str, Any]], label: bool = True) -> None:
        for name, colour in colours.items():
            points = sorted((cell[x], cell["median"][key]) for cell in of if cell["system"] == name)
            if points:
                shown = report["systems"][name]["system"] if label else None
                axis.plot(*zip(*points, strict=True), style, color=colour, label=shown)

    closed = [cell for cell in cells if "scenario" in cell]
    traffic = [cell for cell in cells if "traffic" in cell]
    names = list(dict.fromkeys(cell["traffic"] for cell in traffic))
    rows = 2 * bool(closed) + len(names)
    figure, axes = plt.subplots(rows, 2, figsize=(12, 4 * rows), squeeze=False)
    if closed:
        draw_closed(axes[:2], closed, colours, lines)
    for row, name in zip(axes[rows - len(names) :], names, strict=True):
        of = [cell for cell in traffic if cell["traffic"] == name]
        to = of_adapters(of[0]["adapters"])
        lines(row[0], "requests_per_second", "share_in_time", "o-", of)
        row[0].set(xlabel="requests/s", ylabel="share in time", ylim=(0, 1.05))
        row[0].set_title(f"sampled traffic to {to}: answers in time")
        row[0].legend(fontsize=8)
        lines(row[1], "requests_per_second", "ttft_p50_seconds", "o-", of)
        lines(row[1], "requests_per_second", "ttft_p99_seconds", "o:", of, label=False)
        row[1].set(xlabel="requests/s", ylabel="seconds, p50 solid, p99 dotted", yscale="log")
        row[1].set_title(f"sampled traffic to {to}: time to the first token")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    machine = report["machine"]
    figure.suptitle(f"{report['model']}, {machine['cores']} cores of {machine['cpu']}, {report['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_closed(axes: Any, cells: list[dict[str, Any]], colours: dict[str, str], lines: Callable[..., None]) -> None:
    """Four plots. Only scenarios whose prompts are all their own and of the usual length lie on lines."""
    usual = SCENARIOS["base"]
    plain = [
        cell
        for cell in cells
        if replace(SCENARIOS[cell["scenario"]], name=usual.name, num_adapters=usual.num_adapters) == usual
    ]
    if plain:
        streams_with = Counter(adapters for adapters, _ in {(c["adapters"], c["concurrency"]) for c in plain})
        most = max(
            streams_with, key=lambda adapters: (streams_with[adapters], adapters)
        )  # where there is a line to draw
        streams = sorted({cell["concurrency"] for cell in plain})
        middle = streams[len(streams) // 2]
        mixed = [cell for cell in plain if cell["adapters"] == most]
        lines(axes[0, 0], "concurrency", "output_tokens_per_second", "o-", mixed)
        axes[0, 0].set(xlabel="streams", ylabel="output tokens/s", title=f"throughput with {of_adapters(most)}")
        lines(
            axes[0, 1],
            "adapters",
            "output_tokens_per_second",
            "o-",
            [cell for cell in plain if cell["concurrency"] == middle],
        )
        axes[0, 1].set(xlabel="adapters (0: base model)", ylabel="output tokens/s")
        axes[0, 1].set_title(f"throughput with {middle} streams")
        lines(axes[1, 0], "concurrency", "ttft_p50_seconds", "o-", mixed)
        lines(axes[1, 0], "concurrency", "ttft_p99_seconds", "o:", mixed, label=False)
        axes[1, 0].set(xlabel="streams", ylabel="seconds, p50 solid, p99 dotted", yscale="log")
        axes[1, 0].set_title(f"time to the first token with {of_adapters(most)}")
        axes[0, 1].legend(fontsize=8)
    draw_shares(axes[1, 1], cells, colours)


def draw_shares(axis: Any, cells: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Bars of the share of the limit, one group per scenario and number of streams, from top to bottom."""
    groups = list(dict.fromkeys((cell["scenario"], cell["concurrency"]) for cell in cells))
    width = 0.8 / max(1, len(colours))
    for index, (name, colour) in enumerate(colours.items()):
        own = {(c["scenario"], c["concurrency"]): c for c in cells if c["system"] == name}
        positions = [i for i, group in enumerate(groups) if group in own]
        shares = [own[groups[i]]["median"]["output_tokens_per_second"] / own[groups[i]]["limit"] for i in positions]
        offset = (index - (len(colours) - 1) / 2) * width
        axis.barh([i + offset for i in positions], [100 * share for share in shares], width, color=colour)
    axis.set(xlabel="% of limit", title="share of what the machine could do")
    axis.set_yticks(range(len(groups)), [f"{scenario}, {streams} streams" for scenario, streams in groups])
    axis.tick_params(axis="y", labelsize=8)
    axis.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a JSON file written by benchmarks.serving")
    args = parser.parse_args()
    write_report(json.loads(args.result.read_text()), args.result.with_suffix(""))


if __name__ == "__main__":
    main()
