"""The training stage in the order in which it happens: rows, folder, model, trainer, training, what is left."""

import shutil
import time
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerFast, Trainer

from sft.files import whole_folder, write_json, write_text
from sft.model.adapter import save_adapter, without_copies
from sft.model.load import check_decoding, check_model, keep_freed_memory
from sft.recipe import Recipe
from sft.run import claim, finished
from sft.show import say
from sft.tokens.check import refuse
from sft.tokens.opened import Opened
from sft.train import card, classification, language_modelling
from sft.train.arguments import arguments, check_arguments, check_steps, use_all_cores
from sft.train.checkpoints import check_finite, last_whole_checkpoint
from sft.train.choices import by_machine, settle
from sft.train.record import parameters_line, record
from sft.train.trainer import Ready


def train(recipe: Recipe) -> Path:
    """Train a recipe into its run folder and return the folder of the adapter, or of the whole model.

    A run that is finished is left as it is; one that was interrupted goes on from its last whole checkpoint.
    """
    keep_freed_memory()
    opened, choices = Opened(recipe), by_machine(recipe)
    args = arguments(settle(recipe, choices))
    use_all_cores(args)
    with PartialState().main_process_first():
        check_arguments(recipe, args, check_model(recipe, opened.tokenizer))
        check_decoding(recipe, opened.codec)  # a mistake in `generation:` is reported now, not after hours of training
        labelled = classification.labelled(opened) if recipe.task == "classification" else None
        refuse(recipe, opened.tokens)
        check_steps(args, len(labelled.train if labelled else opened.tokens.train))
        claim(opened, labelled.digests if labelled else opened.tokens.digests)
    if finished(recipe):
        say(f"{recipe.trained}: trained already; delete {recipe.folder} to train again")
        return recipe.trained
    if labelled:
        ready = classification.ready(opened, labelled, choices, args)
    else:
        ready = language_modelling.ready(opened, choices, args)
    return _run(ready, opened.tokenizer)


def _run(ready: Ready, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Train, from the last whole checkpoint if there is one, and leave the model and train.json."""
    recipe, trainer, args = ready.recipe, ready.trainer, ready.trainer.args
    say(parameters_line(trainer.model))
    started = time.monotonic()
    checkpoint = last_whole_checkpoint(Path(str(args.output_dir)), args.world_size)
    with without_copies(recipe, trainer.model, args):
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    check_finite(trainer.model, trainer.state.global_step)
    if trainer.is_world_process_zero():
        _save(recipe, trainer, tokenizer)
        write_json(recipe.folder / "train.json", record(recipe, trainer, seconds, checkpoint) | ready.about)
        if recipe.has_adapter and recipe.task == "language_modelling":
            write_text(recipe.trained / "README.md", card.of_run(recipe))
        shutil.rmtree(str(args.output_dir), ignore_errors=True)
        say(f"{recipe.trained}: written, {seconds:.0f} s of training")
    trainer.accelerator.wait_for_everyone()
    return recipe.trained


def _save(recipe: Recipe, trainer: Trainer, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write what was trained; beside a best model the one of the last step too, which lies in the last checkpoint."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.trained.name == "best_model":
        last = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
        with whole_folder(recipe.folder / "final_model") as folder:
            type(model).from_pretrained(last, dtype=model.dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    with whole_folder(recipe.trained) as folder:
        save_adapter(model, folder) if recipe.has_adapter else model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
