"""Training: TRL's SFTTrainer on masked tokens, resumable, with everything it used written beside the adapter."""

import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft.helpers import disable_input_dtype_casting
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
)
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft import UserError
from sft.check import refuse
from sft.choices import ByLength, by_machine, by_rows, row_lengths, settle
from sft.data import MASKED, Tokens, codec_of, max_length, prepare
from sft.files import checksums, damage, read_json, sizes, whole_folder, write_json
from sft.fit import predicted
from sft.loss import output_losses, supervised_logits
from sft.model import add_adapter, check_model, decoding, keep_freed_memory, load_base
from sft.recipe import Recipe
from sft.run import claim, finished
from sft.show import counts_line, masked_example, pieces, say
from sft.tokenizer import load_tokenizer

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate", "bitsandbytes")


def train(recipe: Recipe) -> Path:
    """Train a recipe into its run folder and return the folder of the adapter, or of the whole model.

    A run that is finished is left as it is; one that was interrupted goes on from its last whole checkpoint.
    """
    keep_freed_memory()
    choices = by_machine(recipe)
    settled = settle(recipe, choices)
    args = arguments(settled)
    use_all_cores(args)
    with PartialState().main_process_first():
        tokenizer = load_tokenizer(recipe)
        check_model(recipe, tokenizer)
        codec = codec_of(recipe, tokenizer)
        decoding(recipe, codec)  # a mistake in `generation:` is told now, not after hours of training
        tokens = prepare(recipe, tokenizer)
        refuse(recipe, tokens)
        claim(recipe, tokens.key)
    if finished(recipe):
        say(f"{recipe.trained}: trained already; delete {recipe.folder} to train again")
        return recipe.trained
    for side, counts in tokens.counts.items():
        say(counts_line(side, counts))
    first = tokens.train[0]
    say(masked_example(codec, first["input_ids"], first["labels"]))

    model = load_base(settled, tokenizer, training=True)
    choices += by_rows(settled, tokens.train, model.config, args.world_size)
    settled = settle(recipe, choices)
    args = arguments(settled)
    for choice in choices:
        say(f"chosen: {choice}")
    if attention := (settled.trainer.get("model_init_kwargs") or {}).get("attn_implementation"):
        model.set_attn_implementation(attention)
    if recipe.lora is not None:
        model = add_adapter(model, recipe)
    trainer = make_trainer(settled, model, tokenizer, tokens, args)
    data = {
        "counts": {side: vars(counts) for side, counts in tokens.counts.items()},
        "tokens": tokens.key,
        "prompt_format": "chat" if codec.chat else "plain",
        "example": pieces(codec.tokenizer, first["input_ids"], first["labels"]),
        "choices": [vars(choice) for choice in choices],
    }
    return run(settled, trainer, tokenizer, data)


def run(recipe: Recipe, trainer: Trainer, tokenizer: PreTrainedTokenizerFast, data: dict[str, Any]) -> Path:
    """Train, from the last whole checkpoint if there is one, and leave the model and train.json, in which `data` tells
    of the rows. Returns the folder of the model."""
    args = trainer.args
    say(_parameters_line(trainer.model))
    started = time.monotonic()
    checkpoint = _last_whole_checkpoint(Path(str(args.output_dir)), args.world_size)
    with _without_copies(recipe, trainer):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    _check_finite(trainer.model, trainer.state.global_step)
    if trainer.is_world_process_zero():
        _save(recipe, trainer, tokenizer)
        write_json(recipe.folder / "train.json", _record(recipe, trainer, seconds, checkpoint) | data)
        shutil.rmtree(str(args.output_dir), ignore_errors=True)
        say(f"{recipe.trained}: written, {seconds:.0f} s of training")
    trainer.accelerator.wait_for_everyone()
    return recipe.trained


def _without_copies(recipe: Recipe, trainer: Trainer) -> AbstractContextManager[None]:
    """Within, LoRA layers on a CPU leave their input as it is: they would copy it to fp32, and autocast back to bf16.
    (DoRA computes norms in its input's type. On a GPU, `sft fit` foresees the copies.)"""
    exact = trainer.args.device.type == "cpu" and trainer.args.bf16 and not (recipe.lora or {}).get("use_dora")
    return disable_input_dtype_casting(trainer.model, active=exact)


DIVERGED = (
    "lower `trainer.learning_rate`, or set `trainer.max_grad_norm: 1.0` and `trainer.bf16: false`, and name another "
    "folder with output=..."
)


def _check_finite(model: Any, step: int) -> None:
    """Raise UserError where a trained weight is no number: the logged losses between two logs would not show it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise UserError(f"`{name}` is not finite after step {step}; {DIVERGED}")


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
            self.args.device.type == "cuda"
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
        loss, correct, count = self.accelerator.reduce(totals, "sum").tolist()
        metrics = {
            "loss": loss / count,
            "perplexity": math.exp(min(loss / count, 700)),
            "token_accuracy": correct / count,
        }
        return {f"{prefix}_{name}": value for name, value in metrics.items()}


class WeightedCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the loss weights padded and joined just as it pads and joins the labels."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        plain = [[float(label != MASKED) for label in e["labels"]] for e in examples]  # of rows without weights
        weights = [e["weights"] or ones for e, ones in zip(examples, plain, strict=True)]
        weighed = [e | {"labels": w} for e, w in zip(examples, weights, strict=True)]
        batch["weights"] = super().torch_call(weighed)["labels"]
        return batch


class Progress(TrainerCallback):
    """A bar with loss, speed, supervised share and time left; a line at each log where there is no terminal."""

    def __init__(self, trainer: Any) -> None:
        """`trainer` counts in `tokens_seen` and `tokens_learned`."""
        self.trainer, self.bar, self.loss = trainer, None, math.nan
        self.started, self.first_step, self.shown = time.monotonic(), 0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(self._state(), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.loss = logs["loss"]
            if not math.isfinite(self.loss):
                raise UserError(f"the loss is {self.loss} at step {state.global_step}; {DIVERGED}")
        if not state.is_world_process_zero:
            return
        line = f"held-out loss {logs['eval_loss']:.4f}" if "eval_loss" in logs else self._state()
        if self.bar is not None and "eval_loss" in logs:
            self.bar.write(f"step {state.global_step}: {line}", file=sys.stderr)
        elif self.bar is None and ("loss" in logs or "eval_loss" in logs):
            steps = state.global_step - self.first_step
            left = (time.monotonic() - self.started) / max(steps, 1) * (state.max_steps - state.global_step)
            say(f"step {state.global_step}/{state.max_steps}: {line}, {left:.0f} s left")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _state(self) -> str:
        seen, learned = self.trainer.tokens_seen, self.trainer.tokens_learned
        speed = seen * self.trainer.args.world_size / (time.monotonic() - self.started)
        return f"loss {self.loss:.4f}, {speed:,.0f} tok/s, {learned / max(seen, 1):.0%} learned"


class MarkWhole(TrainerCallback):
    """Names a checkpoint whole once every process has written its part: a run killed while writing leaves none."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            _check_finite(kwargs["model"], state.global_step)
            write_json(folder / "whole.json", {"processes": args.world_size, "files": sizes(folder)})


def arguments(recipe: Recipe) -> SFTConfig:
    """The SFTConfig of a recipe with the machine's choices in it, and some defaults of our own."""
    own: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_eval_batch_size": 8,
    }
    fixed = {"output_dir": str(recipe.folder / "checkpoints"), "dataset_kwargs": {"skip_prepare_dataset": True}}
    settings = own | recipe.trainer | fixed
    settings.pop("model_init_kwargs", None)  # used by sft.model
    if "gradient_checkpointing" in settings:  # its name before transformers 5
        settings["activation_checkpointing"] = settings.pop("gradient_checkpointing")
    try:
        args = SFTConfig(**settings)
    except Exception as error:
        raise UserError(f"`trainer:` is not accepted by trl.SFTConfig: {error}") from error
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise UserError("`trainer.use_liger_kernel` needs a package that is not installed: pip install liger-kernel")
    if args.packing and args.packing_strategy != "bfd":
        raise UserError(f"`trainer.packing_strategy: {args.packing_strategy}` cuts rows in two; write `bfd`")
    if args.n_gpu > 1:
        raise UserError(f"{args.n_gpu} GPUs and one process; start one for each: PROCESSES={args.n_gpu} ./launch.sh")
    expected = os.environ.get("PROCESSES", str(args.world_size))
    if str(args.world_size) != expected:
        raise UserError(
            f"{expected} processes were asked for, but {args.world_size} run; start them with "
            f"PROCESSES={expected} ./launch.sh"
        )
    return args


def use_all_cores(args: SFTConfig) -> None:
    """`accelerate launch` gives a process on a CPU one thread unless told otherwise: use its share of the cores."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores // args.world_size
    if by_accelerate and args.device.type == "cpu" and threads > 1:
        torch.set_num_threads(threads)
        say(f"accelerate gave each process one thread; using {threads}")


def make_trainer(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: Tokens, args: SFTConfig
) -> OutputTrainer:
    rows = tokens.train
    weighted = "weights" in rows.column_names
    if weighted and (args.loss_type != "nll" or args.label_smoothing_factor):
        raise UserError("segment weights go with the ordinary loss; remove `trainer.loss_type` and label smoothing")
    args.remove_unused_columns = not weighted
    if args.packing:
        rows = pack_dataset(rows.shuffle(seed=args.seed), max_length(recipe), "bfd")
        _prove_packing(model, rows, args.per_device_train_batch_size)
    try:
        trainer = OutputTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=tokens.test, processing_class=tokenizer
        )
    except ValueError as error:
        raise UserError(f"trl.SFTTrainer does not accept this recipe: {error}") from error
    if recipe.eval.training_rows:
        drawn = np.random.default_rng(recipe.eval.seed).permutation(len(tokens.train))[: recipe.eval.training_rows]
        trainer.seen = tokens.train.select(sorted(drawn.tolist()))
    trainer.model_accepts_loss_kwargs = True  # our loss takes num_items_in_batch, whatever the model's forward takes
    if weighted:
        trainer.data_collator = WeightedCollator(
            tokenizer.pad_token_id, padding_free=trainer.padding_free, pad_to_multiple_of=args.pad_to_multiple_of
        )
    for parameter in model.parameters():
        if parameter.requires_grad:  # SFTTrainer casts QLoRA adapters to bf16, where small steps round to nothing
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(trainer))
    trainer.add_callback(MarkWhole())
    return trainer


@torch.no_grad()
def _prove_packing(model: PreTrainedModel, rows: Dataset, together: int) -> None:
    """A document in a packed row gives the logits that it gives alone, and they do not move when the document before it
    is replaced; and a batch of packed rows goes through. Else this architecture is not packed.

    One pair of documents is tried: what lets them see each other lies in the architecture, not in the texts.
    """
    row = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    a, b = row["seq_lengths"][:2]
    ids = torch.tensor([row["input_ids"][: a + b]])
    other = torch.cat([(ids[:, :a] + 1) % model.config.get_text_config().vocab_size, ids[:, a:]], 1)
    batch = rows[: min(together, len(rows))]
    lengths = [length for row in batch["seq_lengths"] for length in row]

    def logits(ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ids, positions = ids.to(model.device), positions.to(model.device)
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()

    model.eval()
    try:
        packed, moved, alone = logits(ids, (a, b))[a:], logits(other, (a, b))[a:], logits(ids[:, a:], (b,))
        logits(torch.tensor([[token for row in batch["input_ids"] for token in row]]), lengths)
    except (RuntimeError, IndexError) as error:
        raise UserError(f"a packed batch fails in this architecture ({error}); write trainer.packing=false") from error
    model.train()
    leak = (packed - moved).abs().max() / alone.std()
    difference = (packed - alone).abs().mean() / alone.std()
    noise = 0.02 if getattr(model, "is_loaded_in_8bit", False) else 1e-3  # 8bit rounds by what shares a batch
    if leak > noise or difference > 0.03:
        raise UserError(
            f"packing is not safe for this architecture: a document's logits change by {max(leak, difference):.1%} of "
            "their spread with what stands before it; write trainer.packing=false"
        )


def _last_whole_checkpoint(folder: Path, processes: int) -> str | None:
    """The newest checkpoint whose files are all there with the sizes they were written with."""
    whole = {}
    for marker in folder.glob("checkpoint-*/whole.json"):
        written = read_json(marker)
        if damage(marker.parent, written["files"]) is None:
            whole[int(marker.parent.name.rsplit("-", 1)[1])] = marker.parent, written["processes"]
    if not whole:
        return None
    newest, before = whole[max(whole)]
    if before != processes:
        raise UserError(
            f"{newest}: was written by {before} processes and would go on with {processes}, which is another batch "
            f"size; set PROCESSES={before}, or delete {folder} to begin anew"
        )
    say(f"going on from {newest}")
    return str(newest)


def _save(recipe: Recipe, trainer: Trainer, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write what was trained; beside a best model the one of the last step too, which lies in the last checkpoint."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.trained.name == "best_model":
        last = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
        with whole_folder(recipe.folder / "final_model") as folder:
            type(model).from_pretrained(last, dtype=model.dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    with whole_folder(recipe.trained) as folder:
        extra = {"save_embedding_layers": False} if recipe.lora is not None else {}  # else it asks the hub
        model.save_pretrained(folder, **extra)
        tokenizer.save_pretrained(folder)


def _record(recipe: Recipe, trainer: Any, seconds: float, checkpoint: str | None) -> dict[str, Any]:
    """What the report tells of a training. `seconds` and `tokens_seen` are of this process, which began at `since`."""
    cuda = torch.cuda.is_available()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    trainable, total = _parameters(trainer.model)
    return {
        "since": int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0,
        "seconds": seconds, "steps": trainer.state.global_step, "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
        "processes": trainer.args.world_size, "device": torch.cuda.get_device_name() if cuda else "CPU",
        "peak_memory_bytes": peak,
        "predicted_memory_bytes": _predicted(recipe, trainer) if cuda else None,
        "trainable_parameters": trainable, "parameters": total,
        "tokens_seen": trainer.tokens_seen * trainer.args.world_size,
        "log": trainer.state.log_history,
        "files": sizes(recipe.trained), "sha256": checksums(recipe.trained),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]},
    }  # fmt: skip


def _predicted(recipe: Recipe, trainer: Any) -> int | None:
    """The peak that `sft fit` foresees. That an unusual model cannot be traced shall not cost a finished training."""
    try:
        return predicted(recipe, trainer.args.per_device_train_batch_size)
    except Exception as error:
        say(f"the memory could not be predicted: {type(error).__name__}: {error}")
        return None


def _parameters(model: Any) -> tuple[int, int]:
    """Trainable and all parameters; a 4-bit weight holds two in a byte."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def _parameters_line(model: Any) -> str:
    trainable, total = _parameters(model)
    return f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})"
