"""What the service and an engine share: their messages, the bus between them, and an engine as its client sees it.

It needs no torch, and it is all of this package that the service imports.
"""
