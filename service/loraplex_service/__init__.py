"""The front-end process: gRPC in, gRPC out, and all of a request that needs no arithmetic. It never imports torch.

A call comes in through `ports`: `auth` says who makes it, and `validation` holds it against its limits. `requests`
takes a generation from its spec to its last token, with `names` (what the field `model` means), `text` (tokenizers and
templates) and `admission` (quotas and queues). `models` runs the engines, `adapters` brings adapters onto them, and
`control` serves the methods about both. `telemetry` reports, `commands` is the command line, and `app` puts all of it
together. Start with `requests.inference`.
"""
