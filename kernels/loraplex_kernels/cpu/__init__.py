"""The operations in C++, several instruction sets, loaded through a plain C interface.

`ops` is the backend, `library` loads the compiled code and declares it to ctypes. The C++ reads from the inside out:
`simd.h` (one instruction set), `multiply.h` (the one inner loop), `pool`, `memory`, then `linear`, `lora`, `attention`,
`rows`, and `api.cpp`, the C face. Every result is the same bit for bit whatever else is in the step.
"""
