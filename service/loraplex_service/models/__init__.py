"""The base models that the operator configured, and the engine process of each.

`host` keeps each model's state, tokenizer and defaults; `supervisor` starts its engine and replaces it when it dies.
"""
