"""The listeners, and all that a call passes before its method: credentials, receiving, checks.

`listeners` builds the two ports and drains them. `interceptors` is what each call passes: it authenticates the caller,
then has `receiving` and `wire` take the message within its size, and `validation` check it. `health`, `probes`,
`reflection` and `tls` are the other parts of a port.
"""
