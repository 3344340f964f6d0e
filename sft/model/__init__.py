"""The base model of a recipe with its quantisation and its adapter, and how far two models are apart.

Called from outside: `load.load_base`, `load.load_trained`, `load.decoding`, `artifact.furnish`, `parity.measure`.
"""
