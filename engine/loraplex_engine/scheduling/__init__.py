"""The plan of a step: which requests run, how far, and on which blocks of the cache. It needs no torch.

`scheduler` decides, with `fairness` between tenants and blocks from `block_manager`; `request` is a sequence with its
state, and `step` the plan and its result, as data. A request that needs something which is not ready waits in
`resources`; `adapters` is the one kind of such things today.
"""
