"""From a candidate to its score.

::

    scorer     the joint: Candidate, Outcome, and the Protocol Scorer
    choice     which scorer, from a task, a command or a Scorer: decided here alone
    asking     a search's questions: answered by the journal, or by the scorer, several at once
    journal    the scores of a search, on disk
    live       scores in a live model in this process
    folders    writes a candidate for a shell command
    workers    scores in other processes; serving is their side, connection what is between
    work       what a built-in scorer is to do, as data
"""
