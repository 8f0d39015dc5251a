"""Tinker's REST API for sampling, as the `tinker` package calls it: futures, sessions, and what is refused."""
