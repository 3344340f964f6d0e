"""Batches of rows whose segments weigh differently."""

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft.tokens.prepare import MASKED


class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the loss weights padded and joined just as it pads and joins the labels."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        plain = [[float(label != MASKED) for label in e["labels"]] for e in examples]  # of rows without weights
        weights = [e["weights"] or ones for e, ones in zip(examples, plain, strict=True)]
        weighed = [e | {"labels": w} for e, w in zip(examples, weights, strict=True)]
        batch["weights"] = super().torch_call(weighed)["labels"]
        return batch
