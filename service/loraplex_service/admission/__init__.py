"""Limits on the work of models and tenants, and the refusals beyond them.

`admission` bounds the queue of each model, `tenants` holds the quotas and weights, `places` bounds calls, unread
answers and refusals.
"""
