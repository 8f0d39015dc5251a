"""Every call of the contract, described once: which method, with which request, answered by what.

An operation says nothing about how it is run: `Client` runs it and waits, `AsyncClient` runs it and is awaited.
"""
