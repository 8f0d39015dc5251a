"""Several processes as one engine: the first rank gives the others orders, and they follow. `machine` is for those on
other machines, which `other_machines` has the first rank know.

One that ends takes all with it, and the service starts the engine anew.
"""
