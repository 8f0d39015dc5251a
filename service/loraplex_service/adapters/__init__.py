"""Adapters on this server: where their files come from, what text they bring, and how they get onto the engines."""
