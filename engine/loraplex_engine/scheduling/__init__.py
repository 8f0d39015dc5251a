"""The plan of a step: which requests run, how far, and on which blocks of the cache. It needs no torch.

`scheduler` decides, with `fairness` between tenants and blocks from `block_manager`; `request` is a sequence with its
state, and `step` the plan and its result, as data. `beam_search` lets several sequences of one request go on side by
side. A request that needs something which is not ready waits in `resources`, whose kinds are `adapters` and `forms`.
"""
