"""TRL's SFTTrainer, with losses that are true means over output tokens."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerControl,
)
from trl import SFTConfig, SFTTrainer, pack_dataset

from sft import UserError
from sft.model.adapter import plain_head
from sft.model.loss import RowLoss, output_losses, supervised_logits
from sft.recipe import Recipe
from sft.recipe.messages import not_accepted
from sft.tokens.prepare import MASKED, Tokens
from sft.train.arguments import check_steps
from sft.train.checkpoints import MarkWhole
from sft.train.choices import ByLength, row_lengths
from sft.train.collator import WeightedCollator
from sft.train.packing import prove_packing
from sft.train.progress import Progress


class Ready(NamedTuple):
    """What a task hands to the stage."""

    recipe: Recipe
    """With all that was chosen written into it."""
    trainer: Trainer
    about: dict[str, Any]
    """What train.json says of the rows."""


class OutputTrainer(SFTTrainer):
    """SFTTrainer whose losses are true means over output tokens, in training and in evaluation."""

    tokens_seen = 0
    tokens_learned = 0
    seen: Dataset | None = None
    """Rows of the training side that are measured with the held-out ones, under names that begin with `seen`."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Token loss over `num_items_in_batch`, the learned tokens of the whole step on all processes."""
        learned = inputs["labels"][:, 1:].ne(MASKED).sum()
        self.tokens_seen += int(
            inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["labels"].numel()
        )
        self.tokens_learned += int(learned)
        if "weights" not in inputs and self._leave_it_to_trl():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits, targets = supervised_logits(model, inputs)
        losses = cross_entropy(logits.float(), targets, reduction="none")
        if "weights" in inputs:
            losses = losses * inputs["weights"][:, 1:][inputs["labels"][:, 1:] != MASKED]
        loss = losses.sum() / (learned if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over the processes afterwards
        return loss

    def _leave_it_to_trl(self) -> bool:
        """TRL's fused head: on a GPU it scores the supervised positions alone, as ours does on a CPU, in less memory;
        and it knows the losses that ours does not."""
        return (
            (self.args.device.type == "cuda" and plain_head(self.accelerator.unwrap_model(self.model)))
            or self.args.loss_type != "nll"
            or self.label_smoother is not None
            or self.aux_loss_enabled
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return ByLength(row_lengths(self.train_dataset), step, args.data_seed or args.seed)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and accuracy over all output tokens. (Trainer's own is a mean of the means of batches.)"""
        metrics = self._measured(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix)
        if self.seen is not None:
            metrics |= self._measured(self.seen, "seen")
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, rows: Dataset, prefix: str) -> dict[str, float]:
        mine = rows.select(range(self.args.process_index, len(rows), self.args.world_size))
        batch_tokens = self.args.per_device_eval_batch_size * max(map(len, rows["input_ids"]))
        results = output_losses(self.model, mine, batch_tokens, self.processing_class.pad_token_id)
        totals = torch.tensor(results, dtype=torch.float64).reshape(-1, 3).sum(0).to(self.args.device)
        total = RowLoss(*self.accelerator.reduce(totals, "sum").tolist())
        metrics = {
            "loss": total.loss / total.tokens,
            "perplexity": math.exp(min(total.loss / total.tokens, 700)),
            "token_accuracy": total.correct / total.tokens,
        }
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


def make_trainer(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: Tokens, args: SFTConfig
) -> OutputTrainer:
    rows = tokens.train
    weighted = "weights" in rows.column_names
    if weighted and (args.loss_type != "nll" or args.label_smoothing_factor):
        raise UserError("segment weights go with the ordinary loss; remove `trainer.loss_type` and label smoothing")
    args.remove_unused_columns = not weighted
    if args.packing:
        rows = pack_dataset(rows.shuffle(seed=args.seed), recipe.max_length, "bfd")
        check_steps(args, len(rows))
        prove_packing(model, rows, args.per_device_train_batch_size)
    try:
        trainer = OutputTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=tokens.test, processing_class=tokenizer
        )
    except Exception as error:  # it builds on each of its settings, in its own way
        raise UserError(not_accepted("trainer", recipe.trainer, "trl.SFTTrainer", error)) from error
    trainer.model_accepts_loss_kwargs = True  # our loss takes num_items_in_batch, whatever the model's forward takes
    if weighted:
        trainer.data_collator = WeightedCollator(
            tokenizer.pad_token_id, padding_free=trainer.padding_free, pad_to_multiple_of=args.pad_to_multiple_of
        )
    for parameter in model.parameters():
        if parameter.requires_grad:  # SFTTrainer casts QLoRA adapters to bf16, where small steps round to nothing
            parameter.data = parameter.data.float()
    equip(trainer, recipe, tokens.train)
    return trainer


def equip(trainer: Any, recipe: Recipe, rows: Dataset) -> None:
    """Give a trainer what each task has: the training rows that are measured too, progress, whole checkpoints."""
    if recipe.eval.training_rows:
        drawn = np.random.default_rng(recipe.eval.seed).permutation(len(rows))[: recipe.eval.training_rows]
        trainer.seen = rows.select(sorted(drawn.tolist()))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(trainer))
    trainer.add_callback(MarkWhole())
