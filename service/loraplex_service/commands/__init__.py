"""Commands of `loraplex`: shared options, and a file for each resource. `cli` imports the one that is asked for."""
