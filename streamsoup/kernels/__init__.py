"""Numbers to numbers: the arithmetic of a block, in four ways with the same bits.

`reference` specifies it, plainly and slowly; `cpu` does it by what numba compiled, at the speed of
memory; `blocks` in numpy, where nothing is compiled; `torch_blocks` on accelerators. Tests hold all
to the first.
"""
