"""The meaning of the name in a request: a model, an adapter or one version of it, a weighted sum, a route.

`catalog` resolves a name to a model and adapter versions; `routing` holds the routes and chooses among their targets.
"""
