"""`loraplex top`: the load of every model, as it changes."""

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loraplex import AdminClient
from loraplex.v1.server_pb2 import ModelLoad, WatchLoadResponse

COLUMNS = ("model", "running", "waiting", "for adapter", "cache", "prefix hits", "tokens/s", "adapters on device")


def watch_load(admin: AdminClient, interval: float, count: int | None, console: Console) -> None:
    """Show the load until interrupted, or `count` times. Without a terminal each table is printed below the last."""
    before: WatchLoadResponse | None = None
    with Live(console=console, auto_refresh=False, transient=False) as live:
        for number, now in enumerate(admin.watch_load(interval=interval), start=1):
            table = load_table(now, before)
            if console.is_terminal:
                live.update(table, refresh=True)
            else:
                console.print(table)
            before = now
            if number == count:
                return


def load_table(now: WatchLoadResponse, before: WatchLoadResponse | None) -> Table:
    """One line for each model. Rates are since `before`."""
    title = f"{now.time.ToDatetime():%H:%M:%S} UTC" + (", draining" if now.draining else "")
    table = Table(*COLUMNS, title=title, box=None)
    earlier = {load.model: load for load in before.models} if before is not None else {}
    seconds = (now.time.ToNanoseconds() - before.time.ToNanoseconds()) / 1e9 if before is not None else 0.0
    for load in now.models:
        table.add_row(*_row(load, earlier.get(load.model), seconds))
    return table


def _row(load: ModelLoad, earlier: ModelLoad | None, seconds: float) -> tuple[str, ...]:
    # An engine that was started again counts from zero.
    tokens = load.completion_tokens_total - (earlier.completion_tokens_total if earlier is not None else 0)
    rate = f"{tokens / seconds:.0f}" if earlier is not None and seconds > 0 and tokens >= 0 else "-"
    return (
        load.model.removeprefix("models/"),
        str(load.running_requests),
        str(load.waiting_requests),
        str(load.waiting_for_adapter_requests),
        _percent(load.cache_tokens_used, load.cache_tokens_total),
        _percent(load.prefix_hit_tokens, load.prefix_lookup_tokens),
        rate,
        str(len(load.device_adapters)),
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"
