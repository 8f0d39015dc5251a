"""All that the service and an engine share. It needs no torch, and the service imports nothing else of this package.

`messages` are what they send each other, `bus` carries them, and `client` is an engine as the service sees it. `config`
and `sampling_params` are parts of messages.
"""
