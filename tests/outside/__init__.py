"""Packages as somebody else would write them: they import public names of streamsoup alone."""
