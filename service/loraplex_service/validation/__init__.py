"""What requests must satisfy before anything looks at what they mean.

`limits` is the one table of limits on fields. `checks` holds a message against it, and against the rules that no table
can state. Neither knows a model.
"""
