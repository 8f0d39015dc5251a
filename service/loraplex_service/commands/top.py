"""`loraplex top`: the load of every model and tenant, as it changes."""

from collections.abc import Iterable
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from loraplex import AdminClient
from loraplex.v1.server_pb2 import ModelLoad, TenantLoad, WatchLoadResponse

MODEL_COLUMNS = (
    "model",
    "running",
    "waiting",
    "for adapter",
    "cache",
    "prefix hits",
    "tokens/s",
    "adapters on device",
    "in host memory",
    "adapter memory",
)
TENANT_COLUMNS = ("tenant", "requests", "requests/s", "prompt tokens", "tokens", "tokens/s", "share")
MAX_TENANTS = 20  # shown: those that use most now


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
    """One line for each model, and one for each tenant. Rates are since `before`."""
    title = f"{now.time.ToDatetime():%H:%M:%S} UTC" + (", draining" if now.draining else "")
    models = Table(*MODEL_COLUMNS, title=title, box=None)
    seconds = (now.time.ToNanoseconds() - before.time.ToNanoseconds()) / 1e9 if before is not None else 0.0
    earlier = {load.model: load for load in before.models} if before is not None else {}
    for load in now.models:
        models.add_row(*_model_row(load, earlier.get(load.model), seconds))
    tenants = Table(*TENANT_COLUMNS, box=None)
    for row in _tenant_rows(now.tenants, before.tenants if before is not None else (), seconds):
        tenants.add_row(*row)
    return Group(models, "", tenants) if now.tenants else Group(models)


def _model_row(load: ModelLoad, earlier: ModelLoad | None, seconds: float) -> tuple[str, ...]:
    return (
        load.model.removeprefix("models/"),
        str(load.running_requests),
        str(load.waiting_requests),
        str(load.waiting_for_adapter_requests),
        _percent(load.cache_tokens_used, load.cache_tokens_total),
        _percent(load.prefix_hit_tokens, load.prefix_lookup_tokens),
        _shown(_rate(load, earlier, seconds)),
        str(len(load.device_adapters)),
        str(load.host_adapters),
        _percent(load.adapter_bytes_used, load.adapter_bytes_total),
    )


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
    return f"{100 * part / whole:.0f} %" if whole else "-"
