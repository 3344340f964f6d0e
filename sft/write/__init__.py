"""What a model writes: after held-out prompts in batches, after a person's prompt as it is written, token by token.

Called from outside: `generate.write`, `predict.predict`, `stream.stream`, `ask.open_run`, `ask.ask`, `next.explore`.
"""
