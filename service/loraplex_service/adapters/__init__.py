"""Adapters on this server: their files, their text, and their way onto the engines.

`library` finds, receives and checks files; `texts` reads the tokens and templates that adapters bring; `registrar`
brings what was found into the registry, and `records` the registry into the state file; `deployer` makes the engines
hold what the registry says, and read what is uploaded while it comes (`reading_ahead`); `background` runs what goes on
after a call.
"""
