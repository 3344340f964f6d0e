"""What a person writes: one YAML file is one run, checked whole before anything heavy is imported.

Called from outside: `load` and `dump`; the sections of a `Recipe` are in `schema`.
"""

from sft.recipe.read import dump as dump
from sft.recipe.read import load as load
from sft.recipe.schema import Recipe as Recipe
