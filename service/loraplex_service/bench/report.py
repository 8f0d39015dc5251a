"""What `loraplex bench` says of its runs: a table, and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LATENCIES = {"ttft": "first token", "tpot": "each next", "gap": "gap", "e2e": "whole"}
SENDER_IS_THE_LIMIT = (
    "The load generator was the limit of this run:"
    "\n  it used {cpu_share:.0%} of a core and was {late:.0f} ms late. The server may be faster."
    "\n  Send less from here, or from several machines at once."
)


def as_text(result: dict[str, Any]) -> str:
    """A run, for people, within 80 columns."""
    head = f"{result['load']}: {result['requests']} requests, {result['failed']} failed"
    lines = [head, *(f"  {count} x {error[:70]}" for error, count in result["errors"].items())]
    if "wall_seconds" in result:
        good = result["requests"] - result["failed"]
        prompt, output = result["prompt_tokens"] / good, result["output_tokens"] / good
        lines += [
            f"  {prompt:.0f} prompt and {output:.0f} output tokens each, on average",
            f"  {result['output_tokens_per_second']:.1f} output tokens/s, "
            f"{result['requests_per_second']:.2f} requests/s over {result['wall_seconds']:.1f} s",
            f"  {result['share_in_time']:.0%} in time: {result['requests_in_time_per_second']:.2f} requests/s",
            f"  {'ms':>12} {'p50':>9} {'p90':>9} {'p99':>9}",
        ]
        for name, title in LATENCIES.items():
            cells = (1e3 * result[f"{name}_p{share}_seconds"] for share in (50, 90, 99))
            lines.append(f"  {title:>12} " + " ".join(f"{cell:9.1f}" for cell in cells))
    if result["sender"]["is_the_limit"]:
        sender = result["sender"]
        said = SENDER_IS_THE_LIMIT.format(cpu_share=sender["cpu_share"], late=1e3 * sender["late_p99_seconds"])
        lines.append(f"  Note: {said}")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput and latencies over the level of the load. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # files only, wherever it runs
    import matplotlib.pyplot as plt

    good = [result for result in results if "wall_seconds" in result]
    levels = [result["level"] for result in good]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    left.plot(levels, [result["output_tokens_per_second"] for result in good], marker="o", label="output tokens/s")
    left.set(xlabel=good[0]["unit"], ylabel="output tokens/s", ylim=(0, None), title="Throughput")
    for name, title in (("ttft", "first token"), ("tpot", "each next token")):
        for share, style in ((50, "-"), (99, "--")):
            values = [1e3 * result[f"{name}_p{share}_seconds"] for result in good]
            right.plot(levels, values, style, marker="o", label=f"{title}, p{share}")
    right.set(xlabel=good[0]["unit"], ylabel="ms", yscale="log", title="Latency")
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
