"""The maths, per device, behind one list of operations.

`ops` states what each operation computes; `selection` chooses a backend once per device; `reference` is pure torch and
defines the correct results; `sampling` is how all of them draw tokens; `cpu` is C++ and `triton` is CUDA.
"""
