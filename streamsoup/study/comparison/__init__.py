"""Were the coefficients good? What the model-soups paper shows, for anyone's models.

* `calibration`, `bootstrap`, `theory`, `barriers`: numbers from logits and scores; numpy alone
* `plane`: coordinates on the plane through three checkpoints
* `cache`: scores and logits, kept by content
* `bench`: any mixture of the ingredients, measured in one live model, each at most once
* `selection`: which ingredients: best, oracle, greedy soup, greedily grown ensemble
* `judging`: gains over the references, and their bootstrap intervals
* `table`: the comparison itself, with `paths` and `landscape` beside it

Source: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, sections 3 and 4.
"""
