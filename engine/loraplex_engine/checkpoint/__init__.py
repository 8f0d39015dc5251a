"""The files of a model: where they lie, the fields of their configuration, and their tensors, one after another.

`weights` finds and reads them, `config_fields` checks the types of their fields, `model_config` is the result as data.
"""
