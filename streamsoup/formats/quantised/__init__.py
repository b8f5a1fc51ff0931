"""Quantised weights, read as what they stand for: codes times scales.

`layouts` finds which tensors are codes, and which scales are theirs, by dtypes, names, shapes and
configuration, and refuses what contradicts itself; `dequantised` is the source that multiplies;
`causes` says what to do about weights that are quantised in other ways.
"""
