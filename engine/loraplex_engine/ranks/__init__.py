"""What the ranks of one model exchange: sums, parts side by side, hidden states, orders, and short notes.

`exchange` says what a layer needs of it, and `group` does it through torch.distributed.
"""
