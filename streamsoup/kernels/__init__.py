"""Numbers to numbers: the arithmetic of a block, in several ways with the same bits.

* `reference` is the specification, element by element, plain and slow.
* `plain` is the base tier of compiled kernels: loops in numba that a reader can check against the
  reference. It runs wherever numba does, and stands in for everything faster.
* `fast` is the fast tier, behind the one switch in `tiers`.
* `blocks` is numpy, where nothing is compiled; `accelerator` is torch.
* `merges_reference` specifies the merges of task vectors, `merging` is their compiled loops,
  `merger` wraps these, `merge_rows` is what both share, and `philox` draws random masks.
* `cpu` wraps the compiled kernels that mix, `inner` those that multiply rows. `leaf_digests` holds
  digests in the making, `environment` the floating-point settings of a thread, and `constants` the
  sizes and words that all of them share.

These files import the plain words (`errors`, `sizes`, `tensors`), `system`, and each other without
a cycle: `constants` and `reference` import none of the others.

What must not change: the bits of any result, in any dtype. They are held to the reference by
`tests/test_arithmetic.py`, `test_inner.py`, `test_digests.py` and `test_tiers.py`.
"""
