"""`loraplex embed`, `classify` and `rerank`: what a model makes of texts, in numbers."""

import json

import click

from loraplex_service.commands.shared import ServerAccess, print_json, print_table, reaches_server


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


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True)
@click.option(
    "--activation", type=click.Choice(["softmax", "sigmoid"]), help="Without it: sigmoid for one label alone."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole response instead of the probabilities.")
@reaches_server
def classify(target: ServerAccess, model: str, texts: tuple[str, ...], activation: str | None, as_json: bool) -> None:
    """Classify TEXTS with MODEL, an adapter or a model with a head for it. A row for each text, or for each token."""
    with target.client() as client:
        response = client.classify(model, texts, activation=activation)
    if as_json:
        print_json(response)
        return
    labels, rows = response.labels, []
    for text, classification in zip(texts, response.classifications, strict=True):
        numbers = [f"{number:.4f}" for number in classification.probabilities]
        rows += [(text, *numbers[start : start + len(labels)]) for start in range(0, len(numbers), len(labels))]
    print_table(("text", *labels), rows)


@click.command()
@click.argument("model")
@click.argument("query")
@click.argument("documents", nargs=-1, required=True)
@click.option("--template", help="A text with {query} and {document} in it, as the head was trained with.")
@click.option("--top-n", type=int, help="Print only so many documents, the best ones.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole response.")
@reaches_server
def rerank(
    target: ServerAccess,
    model: str,
    query: str,
    documents: tuple[str, ...],
    template: str | None,
    top_n: int | None,
    as_json: bool,
) -> None:
    """Say how well DOCUMENTS answer QUERY, by MODEL, an adapter or a model with a head for it. The best comes first."""
    with target.client() as client:
        response = client.rerank(model, query, documents, template=template, top_n=top_n)
    if as_json:
        print_json(response)
        return
    rows = [(f"{ranked.score:.4f}", documents[ranked.index]) for ranked in response.documents]
    print_table(("score", "document"), rows)
