"""The parts of a decoder, built on the operations of `loraplex_kernels`."""
