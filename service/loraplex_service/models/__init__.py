"""The base models that the operator configured, and the engine process that each one has."""
