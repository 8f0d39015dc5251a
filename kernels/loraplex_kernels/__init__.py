"""The maths, per device, behind one list of operations.

`ops` states what each operation computes; `selection` chooses a backend once per device; `reference` is pure torch and
defines the correct results; `draws` is by what tokens are drawn, and `sampling` how, in all of them; `cpu` is C++ and
`triton` is CUDA.
"""
