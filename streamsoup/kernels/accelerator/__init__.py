"""The arithmetic on accelerators, in torch, with the bits of `reference`.

`device` is the seam to whatever runs the work (CUDA, the host, a simulation in tests), `pipeline`
keeps blocks moving to it and back, and `torch_blocks` is what is computed there. These files import
`blocks`, `reference` and each other in that order, upwards; no other kernel imports them.
"""
