"""Averages while a model trains: the accumulator `Average`.

`average` holds `Average`: `live` reads the tensors of a model or state dict, `running` and `window`
keep what the methods need (`host`, `device` and `rooms` say where), and `arithmetic` adds and
rounds blocks of them with the kernels of every soup, so that the bytes are those of the commands
over saved checkpoints. `saving` writes the average as a checkpoint.

It may import what makes soups of files; only the command line imports it.
"""
