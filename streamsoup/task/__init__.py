"""What a user says about their task: how to build the model, and how to score it.

A task is one file of plain functions; nothing is registered and no class is needed::

    def build():                     # the model, once; its weights do not matter
        return MyModel()

    def score(model, split):         # a number, larger is better; or a dictionary of numbers
        return accuracy(model, DATA[split])

The others are needed only by the commands that use them::

    splits = ["val", "test"]         # the first one is searched on; default: ["val"]
    main = "accuracy"                # which number counts, if score returns a dictionary

    def loss(model, split):          # a scalar tensor with a gradient for each held-out batch,
        for x, y in BATCHES[split]:  # or a pair of it and the number of examples in the batch
            yield cross_entropy(model(x), y)

    def predictions(model, split):   # logits (example, class) and labels (example,), by batch
        for x, y in BATCHES[split]:
            yield model(x), y

    def recalibration():             # inputs of the model, to measure BatchNorm statistics on
        for x, _ in BATCHES["train"]:
            yield x

`score` may leave out `split`, or take ``to_beat`` besides: the score that the candidate has to
reach, or None. Once it is out of reach, ``{"at_most": bound}`` may be returned instead of a score;
the decision is the same, only sooner. An ``examples`` entry in the dictionary, a number for each
held-out example, allows paired comparisons.

A score is remembered for the text of the task file, for that of what it loads from its own folder,
and for its attribute ``version``: what else scores depend on, such as data. Of an object, plain
attributes count too, except those whose names begin with an underscore.

While a task's code runs, one thread at a time, the working folder and numpy's error handling are
its own: both are restored afterwards. So a task names its files by absolute paths, or beside
``__file__``.

May import the plain words and `system`. Importing this room loads no torch: tasks do.
"""

from streamsoup.task.scores import Score, read_score
from streamsoup.task.task import EXAMPLES, AnyTask, Task, load_task

__all__ = ["EXAMPLES", "AnyTask", "Score", "Task", "load_task", "read_score"]
