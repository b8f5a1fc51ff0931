"""Recipes of mergekit, read as they are and made by our own rules.

`configuration` reads the file, `parameters` what its settings are for a tensor, `translation` turns
both into a rule, and `merging` makes the soup. It was written against mergekit 0.1.5
(https://github.com/arcee-ai/mergekit): what that version does with a key is what it means here,
except for the arithmetic, which is ours.
"""
