"""The SFTConfig of a recipe, and the processes and threads that it runs with."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from trl import SFTConfig

from sft import UserError
from sft.recipe import Recipe
from sft.show import say


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
    """`accelerate launch` gives a process on a CPU one thread unless it is set: use its share of the cores."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores // args.world_size
    if by_accelerate and args.device.type == "cpu" and threads > 1:
        torch.set_num_threads(threads)
        say(f"accelerate gave each process one thread; using {threads}")
