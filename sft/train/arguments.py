"""The SFTConfig of a recipe, and the processes and threads that it runs with."""

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl import SFTConfig

from sft import UserError
from sft.recipe import Recipe
from sft.recipe.messages import blamed, not_accepted
from sft.show import say

OF_OPTIMIZER = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
TRIED_STEPS, MANY_STEPS = 20, 100_000
"""How many steps of a schedule are tried, and how many it has where the recipe does not say."""


def arguments(recipe: Recipe) -> SFTConfig:
    """The SFTConfig of a recipe with the machine's choices in it, and some defaults of our own."""
    args = configuration(recipe)
    if args.n_gpu > 1:
        raise UserError(f"{args.n_gpu} GPUs and one process; start one for each: PROCESSES={args.n_gpu} ./launch.sh")
    expected = os.environ.get("PROCESSES", str(args.world_size))
    if str(args.world_size) != expected:
        raise UserError(
            f"{expected} processes were asked for, but {args.world_size} run; start them with "
            f"PROCESSES={expected} ./launch.sh"
        )
    return args


def configuration(recipe: Recipe) -> SFTConfig:
    """The same for any number of processes."""
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
        guilty = {
            key: settings[key] for key in blamed(settings, lambda others: SFTConfig(**others)) if key not in fixed
        }
        raise UserError(not_accepted("trainer", guilty, "trl.SFTConfig", error)) from error
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise UserError("`trainer.use_liger_kernel` needs a package that is not installed: pip install liger-kernel")
    if args.packing and args.packing_strategy != "bfd":
        raise UserError(f"`trainer.packing_strategy: {args.packing_strategy}` cuts rows in two; write `bfd`")
    return args


def check_arguments(recipe: Recipe, args: SFTConfig, skeleton: PreTrainedModel) -> None:
    """Make what a trainer makes of its settings: trackers, optimizer, schedule; `skeleton` has no weights.

    Raises UserError for one that cannot be made here, and for a setting that would change nothing.
    """
    if args.router_aux_loss_coef and not hasattr(skeleton.config.get_text_config(), "output_router_logits"):
        raise UserError("`trainer.router_aux_loss_coef` is for mixtures of experts, and this model is none; remove it")
    with _mistake_of(recipe, "report_to"):
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    if options := args.activation_checkpointing_kwargs:
        with _mistake_of(recipe, "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            step = {key: value for key, value in options.items() if key != "every_n_layers"}
            checkpoint(torch.neg, torch.ones(1, requires_grad=True), **({"use_reentrant": False} | step))
    if args.torch_compile:
        with _mistake_of(recipe, "torch_compile_mode", "torch_compile_backend"):
            torch.compile(torch.neg, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
    with _mistake_of(recipe, *OF_OPTIMIZER):
        _optimizer(args, skeleton)
    for key in OF_OPTIMIZER[1:]:
        default = SFTConfig.__dataclass_fields__[key].default
        if recipe.trainer.get(key, default) != default and _changes_no_optimizer(args, skeleton, key):
            raise UserError(f"`trainer.{key}` changes nothing with `trainer.optim: {args.optim.value}`; remove it")
    with _mistake_of(recipe, *OF_SCHEDULE):
        _schedule(args, args.lr_scheduler_kwargs, args.warmup_steps)
    if recipe.trainer.get("warmup_steps") and _ignores_warmup(args):
        raise UserError(f"`trainer.warmup_steps` changes nothing with {_named(args)}; remove it")
    if recipe.trainer.get("lr_scheduler_kwargs"):
        with suppress(TypeError):
            _schedule(args, {"a name that no schedule has": 1}, 0)
            raise UserError(f"`trainer.lr_scheduler_kwargs` change nothing with {_named(args)}; remove them")


def check_steps(args: SFTConfig, rows: int) -> None:
    """Raise UserError where training would end before its first step."""
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise UserError(f"`trainer.dataloader_drop_last` leaves no step: a batch is {batch} rows, and there are {rows}")


@contextmanager
def _mistake_of(recipe: Recipe, *keys: str) -> Iterator[None]:
    """Within, what a library raises is a mistake of these keys of `trainer:`, as far as the recipe sets them."""
    try:
        yield
    except Exception as error:
        given = {key: recipe.trainer[key] for key in keys if key in recipe.trainer}
        raise UserError(not_accepted("trainer", given or dict.fromkeys(keys), "transformers", error)) from error


def _optimizer(args: SFTConfig, skeleton: PreTrainedModel) -> torch.optim.Optimizer:
    """The optimizer of these settings, for one small weight."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, skeleton)
    options = {key: value for key, value in options.items() if key not in ("params", "model", "optimizer_dict")}
    optimizer: torch.optim.Optimizer = kind([torch.nn.Parameter(torch.ones(2, 2))], **options)
    return optimizer


def _changes_no_optimizer(args: SFTConfig, skeleton: PreTrainedModel, key: str) -> bool:
    """Whether the optimizer is the same whatever a setting says."""
    if key == "optim_args":
        names = [pair.partition("=")[0].strip() for pair in str(args.optim_args).split(",")]
        others: list[Any] = [",".join(f"{name}={number}" for name in names) for number in (7, 11)]
    else:
        others = [None, ["a"]] if key == "optim_target_modules" else [0.25, 0.5]
    made = []
    for other in others:
        changed = copy.copy(args)
        setattr(changed, key, other)
        try:
            made.append(repr(Trainer.get_optimizer_cls_and_kwargs(changed, skeleton)))
        except Exception:  # it looks at the setting
            return False
    return made[0] == made[1]


def _ignores_warmup(args: SFTConfig) -> bool:
    """Whether a schedule is the same with warm-up and without."""
    try:
        with_it, without = (_schedule(args, args.lr_scheduler_kwargs, steps) for steps in (5, 0))
    except Exception:  # it looks at the setting
        return False
    return with_it == without


def _schedule(args: SFTConfig, options: dict[str, Any] | None, warmup: float) -> list[float]:
    """The learning rates of the first steps of a schedule, the real one on a plain optimizer."""
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else MANY_STEPS
    warming = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    scheduler = get_scheduler(args.lr_scheduler_type, plain, warming, steps, copy.deepcopy(options))
    rates = []
    for _ in range(min(steps, TRIED_STEPS)):
        rates.append(float(plain.param_groups[0]["lr"]))
        plain.step()
        by_loss = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        scheduler.step(1.0) if by_loss else scheduler.step()
    if not all(map(math.isfinite, rates)) or any(rate < 0 for rate in rates):
        raise ValueError(f"the learning rates would be {', '.join(f'{rate:.2g}' for rate in rates[:5])}, ...")
    return rates


def _named(args: SFTConfig) -> str:
    return f"`trainer.lr_scheduler_type: {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}`"


def use_all_cores(args: SFTConfig) -> None:
    """`accelerate launch` gives a process on a CPU one thread unless it is set: use its share of the cores."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores // args.world_size
    if by_accelerate and args.device.type == "cpu" and threads > 1:
        torch.set_num_threads(threads)
        say(f"accelerate gave each process one thread; using {threads}")
