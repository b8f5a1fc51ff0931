"""The rules that come with the package: one file each, behind the joint in `streamsoup.rule`.

A rule imports plain words and kernels, never the plan, the loop or the writer: those ask the rule.
What must not change: the bytes that a rule makes depend on its parameters and the ingredients only.
"""
