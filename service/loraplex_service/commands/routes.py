"""`loraplex routes`: names that stand for one or several models or adapters."""

import click

from loraplex.operations.base import route_name
from loraplex.v1.generation_pb2 import Constraint
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex_service.commands.forms import asks_for_form
from loraplex_service.commands.shared import ServerAccess, print_json, print_table, reaches_server


@click.group()
def routes() -> None:
    """Names that stand for one or several models or adapters."""


@routes.command("list")
@reaches_server
def list_routes(target: ServerAccess) -> None:
    """List the routes of a tenant (--tenant), or all."""
    with target.client() as client:
        found = client.list_routes(tenant=target.tenant or "-")
    rows = [(r.name, ", ".join(f"{t.model}={t.weight}" for t in r.targets), r.fallback) for r in found]
    print_table(("route", "targets", "fallback"), rows)


@routes.command("get")
@click.argument("name")
@reaches_server
def get_route(target: ServerAccess, name: str) -> None:
    """Show one route."""
    with target.client() as client:
        print_json(client.get_route(name, tenant=target.tenant or "shared"))


@routes.command("set")
@click.argument("name")
@click.argument("targets", nargs=-1, required=True)
@click.option("--fallback", help="Where requests go whose target is not available.")
@asks_for_form
@reaches_server
def set_route(
    target: ServerAccess, name: str, targets: tuple[str, ...], fallback: str | None, form: Constraint | None
) -> None:
    """Send requests for NAME to TARGETS: "legal", or with weights "legal@1a2b3c4d5e6f=95 legal@6f5e4d3c2b1a=5". A form
    is the default of requests that ask for none."""
    route = Route(name=route_name(name, target.tenant or "shared"), fallback=fallback, default_constraint=form)
    for item in targets:
        model, _, weight = item.partition("=")
        if weight and not weight.isdecimal():
            raise click.BadParameter(f"{item!r}: a whole number is expected after the sign =", param_hint="TARGETS")
        route.targets.append(RouteTarget(model=model, weight=int(weight or 1)))
    with target.admin() as admin:
        print_json(
            admin.update_route(route, update_mask=["targets", "fallback", "default_constraint"], allow_missing=True)
        )


@routes.command("resolve")
@click.argument("name")
@click.option("--key", help="The routing key of the request.")
@reaches_server
def resolve(target: ServerAccess, name: str, key: str | None) -> None:
    """Say what a request for NAME, whatever it names, would run on."""
    with target.client() as client:
        print_json(client.resolve_target(name, tenant=target.tenant, target_key=key))


@routes.command("delete")
@click.argument("name")
@reaches_server
def delete_route(target: ServerAccess, name: str) -> None:
    """Delete a route. Requests that it routed go on."""
    with target.admin() as admin:
        admin.delete_route(name, tenant=target.tenant or "shared")
