"""The ports and everything that a call passes before its method: credentials, its message, the limits, its place."""
