"""The state that several replicas share: PostgreSQL keeps the truth, and each replica what it knew last.

Nothing here runs on a request's path: a replica serves from its own memory, and follows the database beside that.
"""
