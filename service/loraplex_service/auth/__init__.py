"""Authentication and authorisation of calls.

A call carries a bearer token (a key of the key file, or a JWT), a client certificate, or it comes from a peer that is
trusted to name the tenant it acts for: `door` makes a `Principal` of that. `access` is the table of all methods, with
the role that each one asks for; what is not in it is refused.
"""
