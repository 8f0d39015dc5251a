"""All that the service and an engine share. It needs no torch, and the service imports nothing else of this package.

`messages` are what they send each other, and `bus` carries them. `client` is an engine as the service sees it: its
`requests` and its `adapters`, over one `connection`. `config` and `sampling_params` are parts of messages.
"""
