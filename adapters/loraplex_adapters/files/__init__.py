"""An adapter as files: found, fetched, trusted and described. It needs no torch, and the service imports it.

`source` finds a directory under an allowed root, `remote` fetches one, and `depot` keeps the server's own copies.
`config`, `names`, `pattern` and `safetensors` read what is in them, and `trust` checks signatures.
"""
