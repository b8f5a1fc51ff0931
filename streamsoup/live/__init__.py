"""Mixes in the memory of a live model: where its parameters lie, and candidates made in place.

May import `output` and what lies below it. What must not change: a trial writes no file, and a
rejected trial leaves no trace.
"""
