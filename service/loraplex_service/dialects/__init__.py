"""Others' gRPC definitions on the data port, for the clients that people have.

A dialect is a servicer that turns a request into one of the contract, has the contract's own servicer answer it within
the same call, and tells the answer in its own words. It decides nothing: credentials, tenants, quotas, limits,
deadlines, records and the drain are those of every call.
"""
