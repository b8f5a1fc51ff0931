"""From a candidate to its score: in this process, in worker processes, or by a shell command."""
