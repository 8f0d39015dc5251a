"""`loraplex bench`: how fast a running server answers, as its callers see it."""

import asyncio
import importlib.util
import json
import math
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loraplex import AsyncClient
from loraplex_service.bench.doors import GrpcDoor, HttpDoor, HttpStreams
from loraplex_service.bench.loops import Generate, RequestError
from loraplex_service.bench.plans import LENGTH_RULE, Length, Plan, Request, make_requests, parse_length
from loraplex_service.bench.report import as_text, draw
from loraplex_service.bench.runs import run
from loraplex_service.commands.shared import ServerAccess, reaches_server, visible

# Words whose tokens prompts are made of: any model has them, and none of its special tokens.
WORDS = (
    "the a of and to in on with from for red green blue small large old new fast slow river mountain house tree stone "
    "bird horse fish boat road bridge market garden window table chair paper letter number music story morning evening"
)


def _length(context: click.Context, option: click.Parameter, text: str) -> Length:
    try:
        return parse_length(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--streams", type=click.IntRange(min=1), multiple=True, help="Clients that wait for their answers.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), multiple=True, help="Requests a second instead.")
@click.option("--burstiness", default=1.0, show_default=True, type=click.FloatRange(0, 10), help="1: Poisson; 0: even.")
@click.option("--requests", default=64, show_default=True, type=click.IntRange(1, 1_000_000), help="Of each run.")
@click.option("--zipf", default=1.0, show_default=True, type=click.FloatRange(0, 10), help="0: all MODELS alike.")
@click.option("--prompt-tokens", callback=_length, default="128", show_default=True, help=LENGTH_RULE)
@click.option("--output-tokens", callback=_length, default="64", show_default=True, help="The same.")
@click.option("--shared-prefix", default=0, type=click.IntRange(min=0), help="Tokens that all prompts begin with.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--seed", default=0, show_default=True, help="The same seed, the same requests.")
@click.option("--http", metavar="HOST:PORT", help="Send them to this port, with OpenAI's API, instead of over gRPC.")
@click.option("--ttft-limit", default=1.0, show_default=True, help="Seconds to a first token that is in time.")
@click.option("--tpot-limit", default=0.1, show_default=True, help="Seconds to each next one, on average.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as one JSON object.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw a picture; needs the extra `bench`.")
@reaches_server
def bench(
    target: ServerAccess,
    models: tuple[str, ...],
    streams: tuple[int, ...],
    rate: tuple[float, ...],
    burstiness: float,
    requests: int,
    zipf: float,
    prompt_tokens: Length,
    output_tokens: Length,
    shared_prefix: int,
    temperature: float,
    top_p: float,
    seed: int,
    http: str | None,
    ttft_limit: float,
    tpot_limit: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Send requests to MODELS (models and adapters, the most asked first), and say what their callers saw.

    Each --streams is a run in which so many clients wait for their answers; each --rate one in which requests come by
    themselves, so many a second. Outputs have exactly the tokens asked for: the end that a model sets is passed over.
    """
    if streams and rate:
        raise click.UsageError("give --streams or --rate: they are different loads")
    if plot is not None:
        _check_can_draw()
    plan = Plan(models, zipf, prompt_tokens, output_tokens, shared_prefix, 0, requests, str(seed), burstiness)
    levels: Sequence[float] = rate or streams or (8,)
    say = (lambda result: None) if as_json else (lambda result: click.echo(visible(as_text(result))))
    limits = (ttft_limit, tpot_limit)
    results = asyncio.run(_runs(target, plan, levels, bool(rate), http, (temperature, top_p), limits, say))
    if as_json:
        click.echo(json.dumps({"models": models, "runs": [_without_nan(result) for result in results]}, indent=2))
    if plot is not None and any("wall_seconds" in result for result in results):
        draw(results, plot)
    if any(result["failed"] == result["requests"] for result in results):
        raise click.ClickException("no request of a run succeeded")


async def _runs(
    target: ServerAccess,
    plan: Plan,
    levels: Sequence[float],
    is_open: bool,
    http: str | None,
    sampling: tuple[float, float],
    limits: tuple[float, float],
    say: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """The figures of every level, one after the other. Raises LoraplexError."""
    async with target.async_client() as client:
        bases = {model: (await client.resolve_target(model)).target.model for model in plan.models}
        of_bases = {base: await _pool(client, base) for base in set(bases.values())}
        pools = {model: of_bases[base] for model, base in bases.items()}
        plan = await _fitted(client, plan, bases.values())
        door = _door(target, client, http, sampling)
        for model in plan.models:  # adapters are on the device then, and nothing is done for the first time
            await _warmed(door, model, pools[model])
        results = []
        for number, level in enumerate(levels):
            each = replace(plan, seed=f"{plan.seed}/{number}")  # no run finds another's prompts in a cache
            work = make_requests(each, pools, level if is_open else None)
            figures = await run(door, work, None if is_open else int(level), *limits)
            unit = "requests/s" if is_open else "streams"
            results.append({"load": f"{level:g} {unit}", "level": level, "unit": unit, **figures})
            say(results[-1])
        return results


async def _pool(client: AsyncClient, model: str) -> list[int]:
    """Tokens of a model to make prompts of. Raises LoraplexError."""
    return list((await client.tokenize(model, WORDS, add_special_tokens=False)).token_ids)


async def _fitted(client: AsyncClient, plan: Plan, bases: Iterable[str]) -> Plan:
    """The plan within the shortest context of those models. Raises LoraplexError."""
    contexts = [(await client.get_model(base)).limits.max_context_tokens for base in set(bases)]
    return replace(plan, longest=min(contexts))


async def _warmed(door: Generate[Request], model: str, pool: Sequence[int]) -> None:
    try:
        await door(Request(model, pool[:8], 2, 0), lambda count: None)
    except RequestError as error:
        raise click.ClickException(visible(f"{model} cannot be asked: {error}")) from error


def _door(
    target: ServerAccess, client: AsyncClient, http: str | None, sampling: tuple[float, float]
) -> Generate[Request]:
    """The way that requests take to the server."""
    if http is None:
        return GrpcDoor(client, *sampling)
    host, colon, port = http.rpartition(":")
    if not colon or not port.isdecimal():
        raise click.UsageError(f"--http {http!r}: HOST:PORT is expected, such as 127.0.0.1:8000")
    tls = None if target.tls_ca is None else ssl.create_default_context(cafile=target.tls_ca)
    headers = {} if target.token is None else {"authorization": f"Bearer {target.token}"}
    return HttpDoor(HttpStreams(host, int(port), tls, headers, target.timeout), *sampling)


def _check_can_draw() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'loraplex-server[bench]'")


def _without_nan(result: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what no request had is null."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in result.items()}
