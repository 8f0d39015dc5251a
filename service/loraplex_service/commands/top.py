"""`loraplex top`: the load of every model and tenant, as it changes."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol

import click
from google.protobuf.duration_pb2 import Duration
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loraplex import AdminClient
from loraplex.v1.server_pb2 import ModelLoad, TenantLoad, WatchLoadResponse
from loraplex_service.commands.shared import ServerAccess, reaches_server, visible

# Within 80 columns, for a name of 12 characters; of longer ones the ends of columns are left out.
MODEL_COLUMNS = ("model", "run", "wait", "cold", "cache", "hits", "tok/s", "first ms", "gap ms", "adapters")
TENANT_COLUMNS = ("tenant", "requests", "req/s", "prompt tokens", "tokens", "tok/s", "share")
MAX_NAMES = 12  # of adapters, shown for a model
MAX_TENANTS = 20  # shown: those that use most now


@click.command()
@click.option("--interval", default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many.")
@reaches_server
def top(target: ServerAccess, interval: float, count: int | None) -> None:
    """Show the load of every model, as it changes."""
    with target.admin() as admin, suppress(KeyboardInterrupt):
        watch_load(admin, interval, count, Console())


def watch_load(admin: AdminClient, interval: float, count: int | None, console: Console) -> None:
    """Show the load until interrupted, or `count` times. Without a terminal each table is printed below the last."""
    before: WatchLoadResponse | None = None
    with Live(console=console, auto_refresh=False, transient=False) as live:
        for number, now in enumerate(admin.watch_load(interval=interval), start=1):
            view = load_view(now, before)
            if console.is_terminal:
                live.update(view, refresh=True)
            else:
                console.print(view)
            before = now
            if number == count:
                return


def load_view(now: WatchLoadResponse, before: WatchLoadResponse | None) -> Group:
    """One line for each model, one for each tenant, and the adapters on the device. Rates are since `before`."""
    title = f"{now.time.ToDatetime():%H:%M:%S} UTC" + (", draining" if now.draining else "")
    seconds = (now.time.ToNanoseconds() - before.time.ToNanoseconds()) / 1e9 if before is not None else 0.0
    earlier = {load.model: load for load in before.models} if before is not None else {}
    models = _table(MODEL_COLUMNS, (_model_row(load, earlier.get(load.model), seconds) for load in now.models), title)
    shown: list[RenderableType] = [models]
    if now.tenants:
        rows = _tenant_rows(now.tenants, before.tenants if before is not None else (), seconds)
        shown += ["", _table(TENANT_COLUMNS, rows)]
    lines = [line for load in now.models for line in _adapter_lines(load)]
    return Group(*shown, *([""] if lines else []), *(Text(visible(line)) for line in lines))


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], title: str | None = None) -> Table:
    """Names to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="ellipsis", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _adapter_lines(load: ModelLoad) -> Iterator[str]:
    """The names of the adapters that are on the device: what is in host memory or on disk has to be fetched first."""
    names = [name.removeprefix("tenants/").replace("/adapters/", "/") for name in load.device_adapters]
    if names:
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        yield f"{load.model.removeprefix('models/')} has at hand: {', '.join(sorted(names)[:MAX_NAMES])}{more}"


def _model_row(load: ModelLoad, earlier: ModelLoad | None, seconds: float) -> tuple[str, ...]:
    memory = _percent(load.adapter_bytes_used, load.adapter_bytes_total)
    before = earlier or ModelLoad()
    first = load.first_tokens_total - before.first_tokens_total
    gaps = load.token_gaps_total - before.token_gaps_total
    return (
        load.model.removeprefix("models/"),
        str(load.running_requests),
        str(load.waiting_requests),
        str(load.waiting_for_adapter_requests),
        _percent(load.cache_tokens_used, load.cache_tokens_total),
        _percent(load.prefix_hit_tokens, load.prefix_lookup_tokens),
        _shown(_rate(load, earlier, seconds)),
        _mean_ms(load.first_token_duration_total, before.first_token_duration_total, first),
        _mean_ms(load.token_gap_duration_total, before.token_gap_duration_total, gaps),
        f"{len(load.device_adapters)}+{load.host_adapters} {memory}",
    )


def _mean_ms(total: Duration, before: Duration, count: int) -> str:
    """The mean of what came since, in milliseconds."""
    return f"{(total.ToNanoseconds() - before.ToNanoseconds()) / count / 1e6:.0f}" if count > 0 else "-"


def _tenant_rows(now: Iterable[TenantLoad], before: Iterable[TenantLoad], seconds: float) -> Iterable[tuple[str, ...]]:
    """One line for each tenant, the one that generates most first."""
    earlier = {load.tenant: load for load in before}
    nothing = TenantLoad()
    rates = {load.tenant: _rate(load, earlier.get(load.tenant, nothing), seconds) or 0.0 for load in now}
    total = sum(rates.values())
    for load in sorted(now, key=lambda load: (-rates[load.tenant], load.tenant))[:MAX_TENANTS]:
        requests = load.requests_total - earlier.get(load.tenant, nothing).requests_total
        yield (
            load.tenant.removeprefix("tenants/"),
            str(load.requests_total),
            _shown(requests / seconds if seconds > 0 else None),
            str(load.prompt_tokens_total),
            str(load.completion_tokens_total),
            _shown(rates[load.tenant] if seconds > 0 else None),
            _percent(rates[load.tenant], total),
        )


class _Counts(Protocol):
    @property
    def completion_tokens_total(self) -> int: ...


def _rate(now: _Counts, before: _Counts | None, seconds: float) -> float | None:
    """Tokens a second; None: not known yet."""
    if before is None or seconds <= 0:
        return None
    tokens = now.completion_tokens_total - before.completion_tokens_total
    return tokens / seconds if tokens >= 0 else None  # an engine that was started again counts from zero


def _shown(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
