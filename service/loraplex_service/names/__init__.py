"""What the name in a request means: a model, an adapter or one version of it, a weighted sum of adapters, a route."""
