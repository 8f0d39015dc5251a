"""Calls of the contract, each described once: method, request, answer.

An operation says nothing about how it is run: `Client` runs it and waits, `AsyncClient` runs it and is awaited.
Their methods are made from here by client/generate.py.
"""
