"""Numbers to numbers: the arithmetic of a block, in four ways with the same bits.

`reference` specifies it, plainly and slowly; `blocks` does it in numpy, ready at once; `cpu` in
numba, at the speed of memory; `torch_blocks` on accelerators. Tests hold all to the first.
"""
