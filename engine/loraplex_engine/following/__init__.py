"""Several processes as one engine: the first rank starts the others and gives them orders, and they follow.

One that ends takes all with it, and the service starts the engine anew.
"""
