"""Will it fit: a recipe's memory on a GPU, traced from its config before a weight is downloaded, and what to change."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sft import UserError
from sft.memory import model_facts
from sft.model.adapter import peft_arguments, training_method
from sft.model.load import device, quantization_config
from sft.recipe.read import load, shipped
from sft.recipe.schema import NewTokenizer, Recipe
from sft.rows.template import read_sample, samples
from sft.show import say, table
from sft.tokens.opened import Opened
from sft.tokens.tokenizer import named_revision

if TYPE_CHECKING:
    from sft.memory.trace import Memory, Step

GIB = 2**30
CUDA_CONTEXT_BYTES = GIB * 3 // 4
"""What CUDA takes for itself in a process: its context, the kernels of torch and bitsandbytes, cuBLAS workspaces."""
ALLOCATOR_SLACK = 0.03
"""What PyTorch's allocator holds beyond the bytes in use, as a share of these."""
DEFAULT_CARD = "24GiB"
HEADER = r"^#   fit +(\S+ [MB]) parameters, .*; (\S+ GiB) at the peak, .*; (\S+ [GM]B) of disk$"
LENGTH_STEP_TOKENS = 64
"""Lengths are answered in multiples of so many tokens."""


@dataclass(frozen=True)
class Fit:
    """The memory of a recipe, and its size on disk, in bytes."""

    memory: "Memory"
    rows: int
    """Rows of a micro-batch."""
    length: int
    """Tokens of the longest row."""
    config_from: str
    download: int
    download_published: bool
    """Whether the hub says so; else it is parameters times the size of one."""
    result: int
    """What training leaves: the adapter, or the whole model; or the best and the last one."""
    checkpoints: int
    """Checkpoints while training: two are kept, and a third is written before the oldest goes."""
    merged: int
    """The model with its adapter merged in, in 16 bits; an export in 16 bits takes the same."""

    @property
    def reserve(self) -> int:
        """What a card needs beside the traced bytes."""
        return CUDA_CONTEXT_BYTES + int(ALLOCATOR_SLACK * self.memory.peak)

    @property
    def needed(self) -> int:
        return self.memory.peak + self.reserve

    @property
    def disk(self) -> int:
        """The most that is on the disk at a time: all of the above."""
        return self.download + self.result + self.checkpoints + (self.merged if self.result < self.merged else 0)


def show(recipe: Recipe, cards: Sequence[str] = (), solve: str | None = None, as_json: bool = False) -> bool:
    """Print what a recipe takes and whether each card has it; with `solve`, the longest context or the largest batch.

    Returns whether the largest card has it. Raises UserError where the model's config is not to be had.
    """
    sizes = {card: parse_size(card) for card in cards or [DEFAULT_CARD]}
    found = fit(recipe)
    fits = {card: found.needed <= size for card, size in sizes.items()}
    solved = {card: _solve(recipe, solve, size) for card, size in sizes.items()} if solve else {}
    changes = {card: list(remedies(recipe, sizes[card])) for card, enough in fits.items() if not enough and not solve}
    if as_json:
        data = asdict(found) | {"reserve": found.reserve, "needed": found.needed, "disk": found.disk}
        print(json.dumps(data | {"fits": fits, "solved": solved, "remedies": changes}, indent=1))
        return any(fits.values())
    say(_table(found))
    for card, enough in fits.items():
        spare = sizes[card] - found.needed
        verdict = f"fits, {gib(spare)} to spare" if enough else f"does not fit, {gib(-spare)} too much"
        say(f"\n{card}: {verdict}")
        if card in solved:
            say(f"{card}: {_solution(str(solve), solved[card])}")
        for setting, needed in changes.get(card, ()):
            say(f"  {setting:<58} {gib(needed):>10}{'  fits' if needed <= sizes[card] else ''}")
    return any(fits.values())


def fit(recipe: Recipe) -> Fit:
    """Trace one step of a recipe's training and add up what it leaves on the disk."""
    import torch

    from sft.memory.trace import trace

    found, step = step_of(recipe)
    memory = trace(step)
    kept = memory.trainable * torch.float32.itemsize
    base = memory.parameters - (memory.trainable if recipe.has_adapter else 0)
    name = recipe.model if isinstance(recipe.model, str) and recipe.base is None else None
    download = model_facts.download(name, base, named_revision(recipe)) if name else model_facts.Download(0, True)
    return Fit(
        memory=memory,
        rows=step.rows,
        length=step.length,
        config_from=found,
        download=download.bytes,
        download_published=download.published,
        result=kept * (2 if recipe.trained.name == "best_model" else 1),
        checkpoints=3 * (kept + memory.bytes["optimizer"]),
        merged=base * 2,
    )


def step_of(recipe: Recipe, rows: int | None = None) -> tuple[str, "Step"]:
    """The training step of a recipe on a GPU with bf16, and where its config is from. `auto` rows are one row here,
    unless `rows` says how many."""
    import torch

    from sft.memory.trace import Step

    source, config = _config(recipe)
    trainer, init = recipe.trainer, recipe.trainer.get("model_init_kwargs") or {}
    asked = trainer.get("per_device_train_batch_size", 8)
    fp16, bf16 = trainer.get("fp16", False), trainer.get("bf16", True)
    checkpointing = trainer.get("activation_checkpointing", trainer.get("gradient_checkpointing", True))
    kwargs = trainer.get("activation_checkpointing_kwargs") or trainer.get("gradient_checkpointing_kwargs") or {}
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    rows = rows or (1 if asked == "auto" else asked)
    head: Literal["tiles", "learned", "all", "classes"] = "tiles"
    if recipe.task == "classification":
        head, config.num_labels = "classes", 2
        config.pad_token_id = 0  # by which the last token of each row is found
    elif trainer.get("label_smoothing_factor"):
        head = "all"
    elif _weighted(recipe):
        head = "learned"
    return source, Step(
        config,
        adapter=peft_arguments(recipe),
        quantization=None if recipe.quantization == "none" else quantization_config(recipe.quantization),
        rows=rows,
        length=trainer.get("max_length", 1024) or positions or 1024,
        packed=trainer.get("packing", False),
        padded=rows > 1,
        accumulate=trainer.get("gradient_accumulation_steps", 1),
        dtype=getattr(torch, init.get("dtype", "bfloat16" if recipe.has_adapter else "float32")),
        autocast=torch.float16 if fp16 else torch.bfloat16 if bf16 else None,
        checkpointing={"every_n_layers": kwargs.get("every_n_layers", 1)} if checkpointing else None,
        head=head,
        optimizer=_optimizer(trainer),
        clip=trainer.get("max_grad_norm", 1.0),
        attention=init.get("attn_implementation"),
    )


def solve_length(recipe: Recipe, size: int) -> int:
    """The longest `trainer.max_length` with which a recipe fits into so many bytes, a multiple of 64; or 0."""
    _, step = step_of(recipe)
    positions = getattr(step.config.get_text_config(), "max_position_embeddings", None) or 2**17
    return LENGTH_STEP_TOKENS * _largest(
        lambda n: _needed(replace(step, length=n * LENGTH_STEP_TOKENS)), size, positions // LENGTH_STEP_TOKENS
    )


def solve_batch(recipe: Recipe, size: int) -> int:
    """The most rows of a micro-batch with which a recipe fits into so many bytes; or 0."""
    return _largest(lambda n: _needed(step_of(recipe, rows=n)[1]), size, 1024)


def automatic(recipe: Recipe, size: int | None) -> Recipe:
    """The recipe with `trainer.per_device_train_batch_size: auto` made a number.

    `gradient_accumulation_steps` is then the rows of a whole step: the micro-batch is its largest divisor that fits
    into a card of `size` bytes (at most 8 rows on a CPU, where `size` is None), and accumulation makes up the rest.
    """
    if recipe.trainer.get("per_device_train_batch_size") != "auto":
        return recipe
    total = recipe.trainer.get("gradient_accumulation_steps", 1)
    most = 8 if size is None else solve_batch(recipe, size)
    if not most:
        raise UserError(f"one row of {step_of(recipe)[1].length} tokens does not fit; `sft fit` says what to change")
    rows = max(n for n in range(1, min(most, total) + 1) if total % n == 0)
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": total // rows}
    return recipe.model_copy(update={"trainer": recipe.trainer | batch})


def checkpointing_needed(recipe: Recipe, size: int) -> tuple[bool, str]:
    """Whether a recipe fits into a card of `size` bytes only with activation checkpointing, which costs a third more
    time; and the sentence that says so. A model that cannot be traced is checkpointed."""
    plain = recipe.model_copy(update={"trainer": recipe.trainer | {"activation_checkpointing": False}})
    try:
        needed = _needed(step_of(plain)[1])
    except Exception as error:  # an unusual model shall train all the same
        return True, f"the memory without it cannot be foreseen ({type(error).__name__}: {error})"
    return needed > size, f"without it, training needs {gib(needed)} of the card's {gib(size)}"


def card_memory(recipe: Recipe) -> int | None:
    """The memory of the card that training runs on, in bytes; None on a CPU."""
    import torch

    where = device(recipe)
    return None if where == "cpu" else int(torch.cuda.mem_get_info(where)[1])


def predicted(recipe: Recipe, rows: int) -> int:
    """The traced peak of a recipe with so many rows in a micro-batch, as `torch.cuda.max_memory_allocated` counts."""
    from sft.memory.trace import trace

    return trace(step_of(recipe, rows)[1]).peak


def remedies(recipe: Recipe, size: int) -> Iterator[tuple[str, int]]:
    """What makes a recipe smaller, each on top of those before, the cheapest first; and the bytes then needed. Ends
    with the first that fits into `size`."""
    trainer, total = dict(recipe.trainer), recipe.trainer.get("gradient_accumulation_steps", 1)
    rows = step_of(recipe)[1].rows
    settings: list[tuple[str, dict[str, Any]]] = []
    if "8bit" not in str(trainer.get("optim")):
        settings.append(("trainer.optim=paged_adamw_8bit", {"optim": "paged_adamw_8bit"}))
    if rows > 1:
        batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * total}
        settings.append((" ".join(f"trainer.{key}={value}" for key, value in batch.items()), batch))
    if step_of(recipe)[1].checkpointing is None:
        settings.append(("trainer.activation_checkpointing=true", {"activation_checkpointing": True}))
    for text, change in settings:
        recipe = recipe.model_copy(update={"trainer": recipe.trainer | change})
        needed = _needed(step_of(recipe)[1])
        yield text, needed
        if needed <= size:
            return
    if recipe.quantization == "none" and recipe.has_adapter:
        smaller = recipe.model_copy(update={"quantization": "4bit"})
        needed = _needed(step_of(smaller)[1])
        if needed < _needed(step_of(recipe)[1]):  # Falcon's layers are not quantised
            recipe = smaller
            yield "quantization=4bit", needed
            if needed <= size:
                return
    if length := solve_length(recipe, size):
        yield f"trainer.max_length={length}", _needed(replace(step_of(recipe)[1], length=length))


def parse_size(text: str) -> int:
    """`24GiB` or `24GB` in bytes; a bare number is GiB. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found:
        raise UserError(f"--gpu {text}: write the memory of the card, for instance 24GiB")
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper()) if unit else 3
    return int(float(number) * (1024 if binary or not unit else 1000) ** power)


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def size_on_disk(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size, 1e5) / 1e6:.1f} MB"


def header(recipe: Recipe) -> str:
    """The line in a recipe's header that says what `fit` found; `listing` reads it."""
    found = fit(recipe)
    memory = found.memory
    return (
        f"#   fit      {_count(memory.parameters)} parameters, {memory.trainable / memory.parameters:.2%} trained; "
        f"{gib(memory.peak)} at the peak, {gib(found.needed)} with reserve; {size_on_disk(found.disk)} of disk"
    )


def listing(width: int) -> str:
    """The shipped recipes: model, parameters, template, method, and what their headers say of memory and disk; a line
    each, or two where that is wider than `width` columns."""
    rows = []
    for path in shipped():
        recipe = load(path)
        said = re.search(HEADER, path.read_text("utf-8"), re.MULTILINE)
        count, peak, disk = said.groups() if said else ("?", "?", "?")
        base = recipe.model if isinstance(recipe.model, str) else "made from scratch"
        rows.append([path.stem, base.rsplit("/", 1)[-1], recipe.template, training_method(recipe), count, peak, disk])
    sizes = ["parameters", "peak", "disk"]
    whole = table(["recipe", "model", "template", "method", *sizes], rows)
    if whole.index("\n") <= width:
        return whole
    head, rule, *lines = table(["recipe", *sizes], [[row[0], *row[4:]] for row in rows]).splitlines()
    about = [f"  {model}, {template}, {method}" for _, model, template, method, *_ in rows]
    pairs = zip([head, *lines], ["  model, template, method", *about], strict=True)
    (first, *rest) = [f"{line}\n{below}" for line, below in pairs]
    return "\n".join([first, rule, *rest])


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _table(found: Fit) -> str:
    memory = found.memory
    lines = [[kind, gib(size)] for kind, size in memory.bytes.items() if size]
    lines += [["peak", gib(memory.peak)], ["reserve: CUDA context, allocator slack", gib(found.reserve)]]
    lines += [["needed on the card", gib(found.needed)]]
    words = "as published" if found.download_published else "by its parameters"
    disk = [["weights to download, " + words, size_on_disk(found.download)]] if found.download else []
    disk += [["checkpoints while training", size_on_disk(found.checkpoints)], ["result", size_on_disk(found.result)]]
    if found.result < found.merged:
        disk.append(["merged, or exported in 16 bits", size_on_disk(found.merged)])
    share = memory.trainable / memory.parameters
    return (
        f"{memory.parameters:,} parameters, {memory.trainable:,} trained ({share:.2%}); config from "
        f"{found.config_from}\n\n"
        + table([f"on the GPU, {found.rows} x {found.length} tokens", "bytes"], lines)
        + f"\n\nthe peak is in: {memory.moment}\n\n"
        + table(["on the disk", "bytes"], [*disk, ["in all", size_on_disk(found.disk)]])
    )


def _solve(recipe: Recipe, what: str, size: int) -> int:
    return solve_length(recipe, size) if what == "max_length" else solve_batch(recipe, size)


def _solution(what: str, value: int) -> str:
    if what == "max_length":
        return f"longest context: trainer.max_length={value}" if value else f"not even {LENGTH_STEP_TOKENS} tokens fit"
    return f"largest micro-batch: trainer.per_device_train_batch_size={value}" if value else "not even one row fits"


def _needed(step: "Step") -> int:
    from sft.memory.trace import trace

    peak = trace(step).peak
    return peak + CUDA_CONTEXT_BYTES + int(ALLOCATOR_SLACK * peak)


def _largest(needed: Callable[[int], int], size: int, most: int) -> int:
    """The largest number from 1 to `most` for which the `needed` bytes, which grow with it, stay within `size`; or 0.

    Memory grows almost on a line, so each guess is where the line through the two nearest points meets `size`.
    """
    at = {1: needed(1)}
    if at[1] > size:
        return 0
    low, high, guess = 1, most + 1, 2
    while high - low > 1:
        at[guess] = needed(guess)
        low, high = (guess, high) if at[guess] <= size else (low, guess)
        a, b = sorted(at, key=lambda n: abs(at[n] - size))[:2]
        slope = (at[b] - at[a]) / (b - a)
        meets = int(a + (size - at[a]) / slope) if slope > 0 else (low + high) // 2
        guess = min(max(meets, low + 1), high - 1)
    return low


def _config(recipe: Recipe) -> tuple[str, Any]:
    """Where the base model's config is from, and the config, without a tokenizer where that can be."""
    from transformers import AutoConfig

    if recipe.base is not None:
        return _config(recipe.base)
    if isinstance(recipe.model, str):
        config, source = model_facts.config(recipe.model, named_revision(recipe))
        return source, config
    vocabulary = recipe.model.get("vocab_size")
    if vocabulary is None and isinstance(recipe.tokenizer, NewTokenizer):
        vocabulary = recipe.tokenizer.vocab_size
    if vocabulary is None:
        vocabulary = len(Opened(recipe).tokenizer)
    ids = {"bos_token_id": None, "eos_token_id": None}  # else a model type's own, which may be beyond the vocabulary
    settings: dict[str, Any] = {"vocab_size": vocabulary} | ids | recipe.model
    return "the recipe", AutoConfig.for_model(**settings)


def _weighted(recipe: Recipe) -> bool:
    """Whether the template gives some of its example another weight than 1; its logits are then kept, not tiled."""
    template = Opened(recipe).template
    where = "the template's example"
    rows = list(samples(template, template.example, where)) if template.example else []
    return any(segment.weight != 1 for row in rows for segment in read_sample(template, row, where)[1])


def _optimizer(trainer: dict[str, Any]) -> Callable[[list[Any]], Any]:
    """Trainer's own choice of optimizer. What is paged is counted as if it were all on the card."""
    from transformers import Trainer, TrainingArguments

    names = ("optim", "optim_args", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    given = {name: trainer[name] for name in names if name in trainer}
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **given)

    def make(parameters: list[Any]) -> Any:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if "is_paged" in kwargs:
            kwargs["is_paged"] = False
        return kind(parameters, **kwargs)

    return make
