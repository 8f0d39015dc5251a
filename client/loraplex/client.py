"""The clients: what can be called on which port. How is in awaiting.py and blocking.py, what exactly in operations/."""

from loraplex import awaiting, blocking
from loraplex.operations import adapters, inference, models, routes, server


class _AsyncReader(awaiting.AsyncCaller):
    """What both ports answer: which models, adapters and routes there are, and what the server takes."""

    get_model = awaiting.runs(models.get_model)
    list_models = awaiting.lists(models.list_models)
    get_adapter = awaiting.runs(adapters.get_adapter)
    list_adapters = awaiting.lists(adapters.list_adapters)
    get_route = awaiting.runs(routes.get_route)
    list_routes = awaiting.lists(routes.list_routes)
    resolve_target = awaiting.runs(routes.resolve_target)
    get_server_info = awaiting.runs(server.get_server_info)


class AsyncClient(_AsyncReader):
    """The data port, with asyncio: generates text, tokenises, looks at what there is."""

    generate = awaiting.runs(inference.generate)
    stream_generate = awaiting.streams_generation(inference.stream_generate)
    batch_generate = awaiting.streams(inference.batch_generate)
    cancel_generation = awaiting.runs(inference.cancel_generation)
    tokenize = awaiting.runs(inference.tokenize)
    detokenize = awaiting.runs(inference.detokenize)


class AsyncAdminClient(_AsyncReader):
    """The admin port, with asyncio: models, adapters and routes that come and go, and the server itself."""

    load_model = awaiting.runs(models.load_model)
    unload_model = awaiting.runs(models.unload_model)
    watch_models = awaiting.streams(models.watch_models)

    create_adapter = awaiting.runs(adapters.create_adapter)
    upload_adapter = awaiting.uploads(adapters.upload_adapter)
    update_adapter = awaiting.runs(adapters.update_adapter)
    delete_adapter = awaiting.runs(adapters.delete_adapter)
    load_adapter = awaiting.runs(adapters.load_adapter)
    unload_adapter = awaiting.runs(adapters.unload_adapter)
    watch_adapters = awaiting.streams(adapters.watch_adapters)

    update_route = awaiting.runs(routes.update_route)
    delete_route = awaiting.runs(routes.delete_route)

    watch_load = awaiting.streams(server.watch_load)
    watch_usage = awaiting.streams(server.watch_usage)


class _Reader(blocking.Caller):
    """What both ports answer: which models, adapters and routes there are, and what the server takes."""

    get_model = blocking.runs(models.get_model)
    list_models = blocking.lists(models.list_models)
    get_adapter = blocking.runs(adapters.get_adapter)
    list_adapters = blocking.lists(adapters.list_adapters)
    get_route = blocking.runs(routes.get_route)
    list_routes = blocking.lists(routes.list_routes)
    resolve_target = blocking.runs(routes.resolve_target)
    get_server_info = blocking.runs(server.get_server_info)


class Client(_Reader):
    """The data port: generates text, tokenises, looks at what there is. May be shared between threads."""

    generate = blocking.runs(inference.generate)
    stream_generate = blocking.streams_generation(inference.stream_generate)
    batch_generate = blocking.streams(inference.batch_generate)
    cancel_generation = blocking.runs(inference.cancel_generation)
    tokenize = blocking.runs(inference.tokenize)
    detokenize = blocking.runs(inference.detokenize)


class AdminClient(_Reader):
    """The admin port: models, adapters and routes that come and go, and the server itself."""

    load_model = blocking.runs(models.load_model)
    unload_model = blocking.runs(models.unload_model)
    watch_models = blocking.streams(models.watch_models)

    create_adapter = blocking.runs(adapters.create_adapter)
    upload_adapter = blocking.uploads(adapters.upload_adapter)
    update_adapter = blocking.runs(adapters.update_adapter)
    delete_adapter = blocking.runs(adapters.delete_adapter)
    load_adapter = blocking.runs(adapters.load_adapter)
    unload_adapter = blocking.runs(adapters.unload_adapter)
    watch_adapters = blocking.streams(adapters.watch_adapters)

    update_route = blocking.runs(routes.update_route)
    delete_route = blocking.runs(routes.delete_route)

    watch_load = blocking.streams(server.watch_load)
    watch_usage = blocking.streams(server.watch_usage)
