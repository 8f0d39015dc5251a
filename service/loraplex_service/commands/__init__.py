"""Commands of `loraplex` that are clients of a running server: shared options, and a file for each resource."""
