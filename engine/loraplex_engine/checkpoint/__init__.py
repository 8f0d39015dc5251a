"""A model's files: where they lie, the fields of their configuration, one tensor after another."""
