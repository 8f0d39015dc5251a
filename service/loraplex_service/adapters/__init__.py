"""Adapters on this server: their files, their text, and their way onto the engines.

`library` finds, receives and checks files; `texts` reads the tokens and templates that adapters bring; `deployer` makes
the engines hold what the registry says.
"""
