"""The fast tier of compiled kernels: the same bits as `plain`, by all that a processor has.

What it may import: `constants`, `plain`, `leaf_digests` and its own files. Only `cpu`, `inner`,
`merger` and `merging` import from it, and numba is imported only by what is compiled.

* `objects` finds compiled kernels in a cache, or has them made; `linking` puts them into memory,
  and `processor` tells what they depend on. These three import neither numba nor LLVM.
* `mix` is the loop over a block. It is made of `means` (float32, where that is exact), `sums`
  (float64) and `xxh3` (digests of what is read and written).
* `products` multiplies rows for `inner`, by the loops of `multiply`.
* `vectors` and `prefetching` are what numba has no words for.

What must not change: the bits. `tests/test_tiers.py` holds every kernel to `plain` and `reference`.
Some of numba's internals are used (`objects.object_file`, `vectors`): where a version of numba has
others, whatever is raised makes `tiers.first_compiled` take the plain kernels, with a warning.
What is here buys 5 % or more of a whole soup on some processor, or goes: ``python -m benchmarks
tiers`` measures it.
"""
