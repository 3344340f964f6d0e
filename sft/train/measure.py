"""`sft fit --measure`: the recipe's own training step on random weights on the GPU at hand, beside the prediction."""

import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from sft import UserError
from sft.memory.fit import ALLOCATOR_SLACK, CUDA_CONTEXT_BYTES, gib, predicted, step_of
from sft.memory.trace import Step, skeleton
from sft.model.load import device
from sft.recipe import Recipe
from sft.show import say, table
from sft.tokens.counts import Counts
from sft.tokens.prepare import MASKED, Tokens
from sft.train.arguments import arguments
from sft.train.choices import by_machine, settle
from sft.train.trainer import OutputTrainer, make_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STEPS = 2
"""The first step makes the optimizer's state, which is alive in every later one."""


def measure(recipe: Recipe) -> None:
    """Train two steps on the GPU and print the predicted and the measured peak, and the error of the prediction.

    Raises UserError where there is no GPU, or it has not enough memory.
    """
    if recipe.task == "classification":
        raise UserError("--measure trains a language model; leave it out for `task: classification`")
    where = device(recipe)
    if where == "cpu":
        raise UserError("there is no GPU to measure on; `sft fit` without --measure predicts what one would need")
    recipe = settle(recipe, by_machine(recipe))
    _, step = step_of(recipe)
    foreseen = predicted(recipe, step.rows)
    torch.cuda.reset_peak_memory_stats(where)
    try:
        two_steps(recipe, step, where)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {torch.cuda.get_device_name(where)}; {gib(foreseen)} were foreseen"
        ) from error
    peak, held = torch.cuda.max_memory_allocated(where), torch.cuda.max_memory_reserved(where)
    free, total = torch.cuda.mem_get_info(where)
    context = total - free - torch.cuda.memory_reserved(where)
    rows = [
        ("peak of the bytes in use", foreseen, peak),
        ("held by the allocator beyond", int(ALLOCATOR_SLACK * foreseen), held - peak),
        ("CUDA context", CUDA_CONTEXT_BYTES, context),
        ("in all", foreseen + int(ALLOCATOR_SLACK * foreseen) + CUDA_CONTEXT_BYTES, held + context),
    ]
    say(f"{torch.cuda.get_device_name(where)}, {step.rows} x {step.length} tokens, {STEPS} steps on random weights\n")
    lines = [[name, gib(a), gib(b), f"{a / b - 1:+.1%}" if b else ""] for name, a, b in rows]
    print(table(["", "predicted", "measured", "error"], lines))


def two_steps(recipe: Recipe, step: Step, where: str) -> OutputTrainer:
    """The trainer after two steps on made rows, each as long as `trainer.max_length` and learned whole."""
    model, tokenizer = random_model(step, where), _tokenizer()
    rows = list(_rows(step, tokenizer.pad_token_id, STEPS * step.accumulate * step.rows))
    tokens = Tokens(Dataset.from_list(rows), Dataset.from_list(rows[:1]), {"train": Counts(), "test": Counts()}, {}, {})
    with tempfile.TemporaryDirectory() as folder:
        short = {
            "max_steps": STEPS,
            "save_strategy": "no",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
        }
        recipe = recipe.model_copy(update={"output": folder, "trainer": recipe.trainer | short})
        trainer = make_trainer(recipe, model, tokenizer, tokens, arguments(recipe))
        trainer.train()
    return trainer


def random_model(step: Step, where: str) -> Any:
    """The step's model with its adapter, each weight drawn and quantised on the device, one layer after the other."""
    import bitsandbytes
    from bitsandbytes.nn import Int8Params, Params4bit

    model, _ = skeleton(step)
    made: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None or old.device.type != "meta":
                continue
            if id(old) not in made:
                dtype = torch.float32 if old.requires_grad else old.dtype
                new = torch.empty(old.shape, dtype=dtype, device=where).normal_(std=0.02)
                if isinstance(module, bitsandbytes.nn.Linear4bit) and name == "weight":
                    kinds = {"quant_type": old.quant_type, "compress_statistics": old.compress_statistics}
                    made[id(old)] = Params4bit(new, requires_grad=False, **kinds).to(where)
                elif isinstance(module, bitsandbytes.nn.Linear8bitLt) and name == "weight":
                    made[id(old)] = Int8Params(new.cpu().half(), requires_grad=False, has_fp16_weights=False).to(where)
                else:
                    made[id(old)] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.ones(buffer.shape, dtype=buffer.dtype, device=where)
    return model.to(where)


def _rows(step: Step, end: int, count: int) -> Iterator[dict[str, list[int]]]:
    """Rows of the longest length; where several make a batch, each second one is a token shorter, as rows differ."""
    for i in range(count):
        ids = [end] * (step.length - (i % 2 if step.padded else 0))
        yield {"input_ids": ids, "labels": [MASKED, *ids[1:]]}


def _tokenizer() -> "PreTrainedTokenizerFast":
    """The least that a trainer wants: an end token, which is all that the rows hold."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
