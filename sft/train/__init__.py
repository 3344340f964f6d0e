"""A recipe to its run folder: TRL's trainer on masked tokens, from the last whole checkpoint if there is one.

Called from outside: `stage.train`; `measure.measure`, the same step on random weights; `summary.summary`.
"""
