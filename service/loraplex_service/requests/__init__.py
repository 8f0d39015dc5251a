"""One request, from its spec to the last of its tokens: `inference` is the way, `run` is the request on it."""
