"""Finished checkpoints: where an output may go, how it is written whole or not at all, and checked.

May import `engine` and what lies below it. What must not change: the output appears in one rename,
when every byte of it is on disk; a killed run leaves the former output, and resumes.
"""
