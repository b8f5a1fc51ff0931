"""Benchmarks: streamsoup against its peers, and against what this machine can do at all.

`python -m benchmarks quick` takes a few minutes, `full` about an hour; `report` makes the tables
and pictures anew from the rows in `results/`. See README.md beside this file.
"""
