"""A causal language model made ready to be trained: base, what the rows and the machine decide, adapter, trainer."""

from collections.abc import Sequence

from trl import SFTConfig

from sft.model.adapter import add_adapter
from sft.model.load import load_base
from sft.show import say
from sft.tokens.account import counts_line
from sft.tokens.example import masked_example, pieces
from sft.tokens.opened import Opened
from sft.train.arguments import arguments
from sft.train.choices import Choice, by_rows, settle
from sft.train.trainer import Ready, make_trainer


def ready(opened: Opened, choices: Sequence[Choice], args: SFTConfig) -> Ready:
    """The trainer of a recipe. What becomes of the rows is shown first, then what was chosen."""
    recipe, tokens, codec = opened.recipe, opened.tokens, opened.codec
    for side, counts in tokens.counts.items():
        say(counts_line(side, counts))
    first = tokens.train[0]
    say(masked_example(codec, first["input_ids"], first["labels"]))
    settled = settle(recipe, choices)
    model = load_base(settled, opened.tokenizer, training=True)
    choices = [*choices, *by_rows(settled, tokens.train, model.config, args.world_size)]
    settled = settle(recipe, choices)
    for choice in choices:
        say(f"chosen: {choice}")
    if attention := (settled.trainer.get("model_init_kwargs") or {}).get("attn_implementation"):
        model.set_attn_implementation(attention)
    if recipe.has_adapter:
        model = add_adapter(model, recipe)
    about = {
        "counts": {side: vars(counts) for side, counts in tokens.counts.items()},
        "prompt_format": "chat" if codec.chat else "plain",
        "example": pieces(codec.tokenizer, first["input_ids"], first["labels"]),
        "choices": [vars(choice) for choice in choices],
    }
    return Ready(settled, make_trainer(settled, model, opened.tokenizer, tokens, arguments(settled)), about)
