"""What a person writes: one YAML file is one run. `load` reads and checks it whole, `dump` writes it."""

from sft.recipe.read import dump as dump
from sft.recipe.read import load as load
from sft.recipe.schema import Recipe as Recipe
