"""Ingredients made to fit together, as `reading` asks: renamed, chosen, of one vocabulary.

`fit` decides, from headers and configurations, what each ingredient has to be for the others;
`arranged` is a source with other names, or with tensors of another source; `rows` one whose
embeddings have rows of others; `tied` finds copies that others do not store. What one ingredient
becomes depends on all that are given with it, so it is decided anew for each list of them.
"""
