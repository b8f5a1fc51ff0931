"""Numbers to numbers: the arithmetic of a block, thrice.

`reference` specifies it, plainly and slowly; `blocks` does it in numpy, ready at once; `cpu` in
numba, at the speed of memory. The same bits come out of each, and tests hold them to it.
"""
