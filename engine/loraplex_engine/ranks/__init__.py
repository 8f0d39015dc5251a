"""What the ranks of one model exchange: sums, parts side by side, orders, and short notes.

`exchange` says what a layer needs of it, and `group` does it through torch.distributed.
"""
