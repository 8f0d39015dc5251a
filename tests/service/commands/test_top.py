"""`loraplex top`, from two messages of WatchLoad."""

from rich.console import Console

from loraplex.v1.server_pb2 import ModelLoad, TenantLoad, WatchLoadResponse
from loraplex_service.commands.top import load_view


def at(seconds: int, models: list[ModelLoad], tenants: list[TenantLoad]) -> WatchLoadResponse:
    response = WatchLoadResponse(models=models, tenants=tenants)
    response.time.FromSeconds(seconds)
    return response


def shown(now: WatchLoadResponse, before: WatchLoadResponse | None) -> dict[str, list[str]]:
    """The cells of each line, by the first of them."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(load_view(now, before))
    lines = [line.replace(" %", "%").split() for line in capture.get().splitlines()]
    return {line[0]: line[1:] for line in lines if line and "has at hand" not in " ".join(line)}


def model(tokens: int) -> ModelLoad:
    return ModelLoad(
        model="models/tiny",
        running_requests=3,
        waiting_requests=2,
        waiting_for_adapter_requests=1,
        cache_tokens_total=100,
        cache_tokens_used=25,
        prefix_lookup_tokens=10,
        prefix_hit_tokens=5,
        completion_tokens_total=tokens,
        device_adapters=["tenants/shared/adapters/a@1"],
        host_adapters=4,
        adapter_bytes_total=10,
        adapter_bytes_used=1,
    )


def tenant(name: str, requests: int, tokens: int) -> TenantLoad:
    return TenantLoad(
        tenant=f"tenants/{name}", requests_total=requests, prompt_tokens_total=7, completion_tokens_total=tokens
    )


def test_a_model_has_its_load_its_adapters_by_tier_and_its_rate() -> None:
    lines = shown(at(2, [model(300)], []), at(0, [model(100)], []))
    assert lines["tiny"] == ["3", "2", "1", "25%", "50%", "100", "-", "-", "1+4", "10%"]


def test_a_rate_is_not_known_at_first_nor_after_a_restart() -> None:
    assert shown(at(2, [model(300)], []), None)["tiny"][5] == "-"
    assert shown(at(2, [model(5)], []), at(0, [model(100)], []))["tiny"][5] == "-"


def test_latencies_are_of_what_came_since() -> None:
    loads = [model(100), model(300)]
    for load, count in zip(loads, (10, 30), strict=True):
        load.first_tokens_total, load.token_gaps_total = count, 10 * count
        load.first_token_duration_total.FromMilliseconds(50 * count)
        load.token_gap_duration_total.FromMilliseconds(20 * count)
    line = shown(at(2, [loads[1]], []), at(0, [loads[0]], []))["tiny"]
    assert line[6:8] == ["50", "2"]


def test_adapters_at_hand_are_named() -> None:
    assert shown(at(2, [model(1)], []), None)["tiny"]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(load_view(at(2, [model(1)], []), None))
    assert "tiny has at hand: shared/a@1" in capture.get()


def test_a_server_cannot_steer_the_terminal_by_its_names() -> None:
    console = Console(width=200)
    hostile = model(1)
    hostile.model, hostile.device_adapters[0] = "models/\x1b[2J[red]x", "tenants/t/adapters/\x9b2J"
    with console.capture() as capture:
        console.print(load_view(at(2, [hostile], [tenant("\x1b]0;t\x07", 1, 1)]), None))
    assert not {"\x1b", "\x9b", "\x07"} & set(capture.get())
    assert "\\u001b[2J[red]x" in capture.get()


def test_no_line_is_wider_than_a_terminal() -> None:
    console = Console(width=80)
    wide = model(123_456)
    wide.model = "models/llama-3.1-8b"
    with console.capture() as capture:
        console.print(load_view(at(2, [wide], [tenant("acme", 10_000, 1_000_000)]), None))
    assert "…" not in capture.get()


def test_tenants_are_shown_by_what_they_use_now() -> None:
    before = at(0, [], [tenant("acme", 1, 1000), tenant("beta", 1, 0)])
    lines = shown(at(2, [], [tenant("acme", 2, 1050), tenant("beta", 3, 150)]), before)
    assert lines["beta"] == ["3", "1", "7", "150", "75", "75%"]
    assert lines["acme"] == ["2", "0", "7", "1050", "25", "25%"]
    assert list(lines).index("beta") < list(lines).index("acme")


def test_a_tenant_that_is_new_began_with_nothing() -> None:
    assert shown(at(2, [], [tenant("acme", 1, 10)]), at(0, [], []))["acme"][4] == "5"
