"""The JSON Schema of a recipe, which gives editors completion."""

from typing import Any

from sft.recipe.checks import AUTO, LOADED_WITH, OWNED
from sft.recipe.fields import LIBRARIES
from sft.recipe.schema import Recipe


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the libraries' own fields, for editors."""
    schema = Recipe.model_json_schema()
    for section, fields in LIBRARIES.items():
        node = {"type": "object", "additionalProperties": False, "description": f"{fields.owner}, by its own names."}
        known = {name: kind.schema() for name, kind in fields().items() if name not in OWNED[section]}
        if section == AUTO[0][0]:
            known[AUTO[0][1]] = {"anyOf": [known[AUTO[0][1]], {"const": AUTO[1]}]}
            loading = {name: kind.schema() for name, kind in LOADED_WITH.items()}
            known["model_init_kwargs"] = {"type": "object", "additionalProperties": False, "properties": loading}
        node["properties"] = known
        schema["properties"][section] = node
    return schema
