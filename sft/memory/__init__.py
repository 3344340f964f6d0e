"""What the training step of a recipe takes on a GPU, traced before a weight is there.

Called from outside: `fit.fit`, `fit.show`, `fit.automatic`, `trace.trace`, `model_facts.config`.
"""
