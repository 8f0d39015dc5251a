"""The pieces that a decoder is built from, on top of the operations of `kernels`."""
