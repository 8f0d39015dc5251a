"""The maths, per device, behind one list of operations.

`ops` states what each operation computes and chooses a backend once per device; `reference` is pure torch and defines
what is right; `cpu` is C++ and `triton` is CUDA.
"""
