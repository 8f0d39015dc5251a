"""Commands of `loraplex` that are clients of a running server: what they share, and a file for each resource."""
