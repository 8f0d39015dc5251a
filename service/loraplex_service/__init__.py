"""The front-end process: gRPC in, gRPC out, and everything about a request that needs no arithmetic.

Start with `inference` (one request from spec to stream), then `control` (models, adapters, tokens), `app` (how it is
put together) and `supervisor` (how the engine processes are kept alive). Nothing here imports torch, even indirectly.
"""
