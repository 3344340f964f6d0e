"""What the settings of a recipe make, made on a model without weights before a row is read."""

from sft.model.load import OutOfReach, check_decoding, check_model
from sft.recipe import Recipe
from sft.recipe.checks import AUTO
from sft.show import say
from sft.tokens.opened import Opened
from sft.train.arguments import check_arguments, configuration


def check_settings(opened: Opened) -> None:
    """Make the adapter, the trainer's arguments, trackers, optimizer and schedule, and try out the decoding.

    Raises UserError for a setting that a library does not accept, or would pass over. Where the model's config cannot
    be had, that is said, and what depends on it is left to `sft train`.
    """
    recipe = opened.recipe
    args = configuration(_with_a_number(recipe))
    try:
        skeleton = check_model(recipe, opened.tokenizer)
    except OutOfReach as error:
        say(f"not checked against the model: {error}")
    else:
        check_arguments(recipe, args, skeleton)
    check_decoding(recipe, opened.codec)


def _with_a_number(recipe: Recipe) -> Recipe:
    """`auto` rows are chosen when training begins, by the card that is there then."""
    section, key = AUTO[0]
    batch = {key: 1} if getattr(recipe, section).get(key) == AUTO[1] else {}
    return recipe.model_copy(update={section: getattr(recipe, section) | batch})
