"""What a training leaves about itself, in train.json."""

import resource
import sys
from importlib.metadata import version
from typing import Any

import torch

from sft.files import checksums, sizes
from sft.memory.fit import predicted
from sft.memory.trace import ParameterCount
from sft.recipe import Recipe
from sft.show import say
from sft.tokens.tokenizer import described_base

RECORDED_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate", "bitsandbytes")


def record(recipe: Recipe, trainer: Any, seconds: float, checkpoint: str | None) -> dict[str, Any]:
    """What the report says of a training. `seconds` and `tokens_seen` are of this process, which began at `since`."""
    cuda = torch.cuda.is_available()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    count = parameter_count(trainer.model)
    return {
        "since": int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0,
        "seconds": seconds, "steps": trainer.state.global_step, "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
        "processes": trainer.args.world_size, "device": torch.cuda.get_device_name() if cuda else "CPU",
        "peak_memory_bytes": peak,
        "predicted_memory_bytes": _predicted(recipe, trainer) if cuda else None,
        "trainable_parameters": count.trainable, "parameters": count.total,
        "tokens_seen": trainer.tokens_seen * trainer.args.world_size,
        "log": trainer.state.log_history,
        "base": described_base(recipe),
        "files": sizes(recipe.trained), "sha256": checksums(recipe.trained),
        "versions": {name: version(name) for name in RECORDED_VERSIONS} | {"python": sys.version.split()[0]},
    }  # fmt: skip


def _predicted(recipe: Recipe, trainer: Any) -> int | None:
    """The peak that `sft fit` foresees. That an unusual model cannot be traced shall not cost a finished training."""
    try:
        return predicted(recipe, trainer.args.per_device_train_batch_size)
    except Exception as error:
        say(f"the memory could not be predicted: {type(error).__name__}: {error}")
        return None


def parameter_count(model: Any) -> ParameterCount:
    """The parameters of a model; a 4-bit weight holds two in a byte."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
        return ParameterCount(int(total), int(trainable))
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, _ in counts), sum(n for n, trained in counts if trained))


def parameters_line(model: Any) -> str:
    count = parameter_count(model)
    return f"training {count.trainable:,} of {count.total:,} parameters ({count.trainable / count.total:.2%})"
