"""What the operating system provides: memory, files, folders, locks and child processes.

May import `streamsoup.errors` alone. Nothing here knows what a checkpoint is.
"""
