"""`loraplex embed`: what a model makes of texts, in numbers."""

import json

import click

from loraplex_service.commands.shared import ServerAccess, print_json, reaches_server


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True)
@click.option("--pooling", type=click.Choice(["last", "mean"]), help="Without it: as the checkpoint says.")
@click.option("--dimensions", type=int, help="Only so many numbers of each vector, its first ones.")
@click.option("--normalize/--no-normalize", default=None, help="Without it: as the checkpoint says.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole response instead of the vectors.")
@reaches_server
def embed(
    target: ServerAccess,
    model: str,
    texts: tuple[str, ...],
    pooling: str | None,
    dimensions: int | None,
    normalize: bool | None,
    as_json: bool,
) -> None:
    """Turn TEXTS into vectors with MODEL: a model, an adapter, or an adapter version. A line of JSON for each."""
    with target.client() as client:
        response = client.embed(model, texts, pooling=pooling, dimensions=dimensions, normalize=normalize)
    if as_json:
        print_json(response)
        return
    for embedding in response.embeddings:
        click.echo(json.dumps(list(embedding.values)))
