"""Each setting of the libraries alone, with a valid and an absurd value: trained, refused, or found out.

python tests/settings_fuzz.py llama trainer 0/4

prints a line of JSON for each setting of a section, or of a fourth of it, trained for one step on ten rows in a process
of its own: `refused` (a UserError), `same` or `differs` (from the run without the setting), `traceback`, `hung`.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest

from sft import UserError
from sft.recipe import load
from sft.recipe.checks import OWNED
from sft.recipe.fields import LIBRARIES, Kind

SEED = 0
PATIENCE_SECONDS = 60
TRAINED = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01, "eval_strategy": "steps",
           "eval_steps": 1, "train_sampling_strategy": "random"}  # fmt: skip

VALID: dict[str, Any] = {
    "lora.target_modules": [["q_proj"], ["c_attn"]], "lora.exclude_modules": [["q_proj"], ["c_attn"]],
    "lora.modules_to_save": [["lm_head"]], "lora.rank_pattern": [{"q_proj": 2}, {"c_attn": 2}],
    "lora.alpha_pattern": [{"q_proj": 2}, {"c_attn": 2}], "lora.trainable_token_indices": [[1, 2]],
    "lora.velora_config": [{"num_groups": 4}], "lora.layer_replication": [[[0, 2], [1, 2]]],
    "lora.use_bdlora": [{"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}],
    "trainer.lr_scheduler_type": ["cosine"], "trainer.optim": ["sgd"], "trainer.eval_strategy": ["epoch", "no"],
    "trainer.save_strategy": ["no", "best"], "trainer.logging_strategy": ["no", "epoch"],
    "trainer.loss_type": ["dft", "chunked_nll"], "trainer.report_to": ["all"], "trainer.debug": ["underflow_overflow"],
    "trainer.eos_token": [conftest.END], "trainer.pad_token": ["a"], "trainer.metric_for_best_model": ["perplexity"],
    "trainer.train_sampling_strategy": ["group_by_length", "sequential"], "trainer.packing_strategy": ["bfd"],
    "trainer.model_init_kwargs": [{"attn_implementation": "eager"}], "trainer.ddp_backend": ["gloo"],
    "trainer.activation_checkpointing_kwargs": [{"use_reentrant": True}],
    "generation.stop_strings": [["a"]], "generation.bad_words_ids": [[[7]]], "generation.suppress_tokens": [[7]],
    "generation.begin_suppress_tokens": [[7]], "generation.sequence_bias": [[[[7], 9.0]]],
    "generation.exponential_decay_length_penalty": [[1, 2.0]], "generation.watermarking_config": [{"bias": 3.0}],
}  # fmt: skip
"""What is right where the type does not say it. The first that is accepted counts."""

NOT_TRIED = {
    "trainer.torch_compile": "it compiles for a minute", "trainer.torch_compile_backend": "it compiles for a minute",
    "trainer.torch_compile_mode": "it compiles for a minute",
}  # fmt: skip


SAME_BYTES = "it changes memory or time, and no result"
PROCESSES = "it is for several processes"
MACHINES = "it is for several machines"
PRINTED = "it changes what is printed"
GOES_ON = "it tells in a run that goes on"
LATER = "it tells after more than one step"
ITS_TEXTS = "it tells in texts that have such tokens, or end so soon"

NO_TRACE = {
    "trainer.num_train_epochs": "`max_steps` is set, which comes first",
    "trainer.lr_scheduler_type": LATER, "trainer.eval_steps": LATER, "trainer.eval_strategy": LATER,
    "trainer.eval_delay": LATER, "trainer.logging_strategy": LATER, "trainer.logging_steps": LATER,
    "trainer.save_strategy": "checkpoints go when training is done", "trainer.save_total_limit": LATER,
    "trainer.save_steps": "checkpoints go when training is done", "trainer.load_best_model_at_end": LATER,
    "trainer.metric_for_best_model": LATER, "trainer.greater_is_better": LATER,
    "trainer.average_tokens_across_devices": PROCESSES, "trainer.ddp_find_unused_parameters": PROCESSES,
    "trainer.ddp_broadcast_buffers": PROCESSES, "trainer.ddp_bucket_cap_mb": PROCESSES,
    "trainer.ddp_static_graph": PROCESSES, "trainer.ddp_timeout": PROCESSES, "trainer.ddp_backend": PROCESSES,
    "trainer.log_on_each_node": MACHINES, "trainer.save_on_each_node": MACHINES,
    "trainer.activation_checkpointing": SAME_BYTES, "trainer.gradient_checkpointing": SAME_BYTES,
    "trainer.activation_checkpointing_kwargs": SAME_BYTES, "trainer.gradient_checkpointing_kwargs": SAME_BYTES,
    "trainer.torch_empty_cache_steps": SAME_BYTES, "trainer.dataloader_num_workers": SAME_BYTES,
    "trainer.dataloader_pin_memory": SAME_BYTES, "trainer.dataloader_in_order": SAME_BYTES,
    "trainer.per_device_eval_batch_size": SAME_BYTES, "trainer.pad_to_multiple_of": SAME_BYTES,
    "trainer.full_determinism": "it is so on a CPU", "trainer.use_cpu": "there is a CPU alone, or the tests say so",
    "trainer.bf16": "it is chosen so where the CPU has it", "trainer.fp16": "it is for a GPU",
    "trainer.model_init_kwargs": "it is chosen so where the rows are short",
    "trainer.report_to": "no tracker is installed, or it writes elsewhere",
    "trainer.log_level": PRINTED, "trainer.log_level_replica": PRINTED, "trainer.disable_tqdm": PRINTED,
    "trainer.logging_nan_inf_filter": "it tells where a loss is no number", "trainer.debug": "it tells of infinities",
    "trainer.ignore_data_skip": GOES_ON, "trainer.restore_callback_states_from_checkpoint": GOES_ON,
    "trainer.dataloader_drop_last": "the last batch is not reached", "trainer.max_grad_norm": "the gradient is small",
    "trainer.eos_token": "it is the one there is", "trainer.pad_token": "nothing is learned from it",
    "trainer.loss_type": "chunked_nll is nll in pieces", "trainer.trackio_static_space_id": "false asks for nothing",
    "generation.min_length": ITS_TEXTS, "generation.min_new_tokens": ITS_TEXTS, "generation.max_time": SAME_BYTES,
    "generation.stop_strings": ITS_TEXTS, "generation.no_repeat_ngram_size": ITS_TEXTS,
    "generation.bad_words_ids": ITS_TEXTS, "generation.suppress_tokens": ITS_TEXTS,
    "generation.begin_suppress_tokens": ITS_TEXTS, "generation.repetition_penalty": ITS_TEXTS,
    "generation.renormalize_logits": "it tells with beams",
    "generation.remove_invalid_values": "it tells of infinities",
}  # fmt: skip
"""Settings that leave no trace in one step on ten rows, or in six tokens, each with its reason."""


def values(section: str, key: str, kind: Kind, drawn: random.Random) -> list[Any]:
    """A valid value, as far as can be told, or several, and an absurd one."""
    types, name = kind.types, f"{section}.{key}"
    valid = list(VALID.get(name, ()))
    if not valid:
        valid += [choice for choice in kind.choices if choice != _default(section, key)][:1]
        valid += [not _default(section, key)] if bool in types else []
        valid += [3] if int in types and float not in types else [0.5] if float in types else []
        valid += ["word"] if types and not valid and str in types else []
    absurd: list[Any] = [-1] if int in types and float not in types else [-1.0, 1e30] if float in types else []
    absurd += ["absurd"] if str in types or not types else []
    absurd += [["absurd"]] if list in types or not types else []
    absurd += [{"absurd": 1}] if dict in types or not types else []
    return valid + ([drawn.choice(absurd)] if absurd else [])


def _default(section: str, key: str) -> Any:
    from peft import LoraConfig
    from trl import SFTConfig

    field = {"lora": LoraConfig, "trainer": SFTConfig}.get(section)
    return getattr(field.__dataclass_fields__[key], "default", None) if field else None


def outcome(recipe: Path, section: str, setting: str | None) -> tuple[str, str]:
    """What becomes of a recipe with one setting more, in this process."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            changes = [f"output={folder}/run", *([setting] if setting else [])]
            result = _written(load(recipe, changes)) if section == "generation" else _trained(load(recipe, changes))
        except UserError as error:
            return "refused", str(error)
        except BaseException as error:
            return "traceback", f"{error!r:.200} {traceback.format_exc()[-300:]}"
    return "done", result


def _trained(recipe: Any) -> str:
    from sft.train.stage import train

    train(recipe)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(recipe.trained.glob("*.safetensors"))))
    log = json.loads((recipe.folder / "train.json").read_text())["log"]
    log = [{key: value for key, value in e.items() if "runtime" not in key and "per_second" not in key} for e in log]
    return f"{digest.hexdigest()} {log} {sorted(path.name for path in recipe.folder.rglob('*'))}"


def _written(recipe: Any) -> str:
    import torch

    from sft.model.load import check_decoding, decoding, load_base
    from sft.tokens.opened import Opened
    from sft.write.generate import write

    opened = Opened(recipe)
    check_decoding(recipe, opened.codec)
    torch.manual_seed(SEED)
    model, prompts = load_base(recipe, opened.tokenizer), opened.codec.prompts(["Mira went to the well", "Tom"])
    return str(write(model, opened.codec, prompts, decoding(recipe, opened.codec), 4096))


def apart(*arguments: Any) -> tuple[str, str]:
    """The outcome in a process of its own."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=lambda: answers.put(outcome(*arguments)))
    process.start()
    try:
        answer: tuple[str, str] = answers.get(timeout=PATIENCE_SECONDS)
    except Exception:
        answer = "hung", f"no answer after {PATIENCE_SECONDS} s"
    process.kill()
    process.join()
    return answer


def fuzz(folder: Path, model_type: str, section: str, part: int, parts: int) -> Iterator[dict[str, str]]:
    """The outcomes of a section, or of a part of it."""
    recipe = conftest.write_recipe.__wrapped__()(  # type: ignore[attr-defined]
        folder, conftest.ROWS[:10], trainer=TRAINED, generation={"max_new_tokens": 6}
    )
    plain = apart(recipe, section, None)
    assert plain[0] == "done", plain
    drawn = random.Random(SEED)
    for number, (key, kind) in enumerate(LIBRARIES[section]().items()):
        tried = values(section, key, kind, drawn)
        if number % parts != part or key in OWNED[section] or f"{section}.{key}" in NOT_TRIED:
            continue
        for value in tried:
            setting = f"{section}.{key}={json.dumps(value)}"
            word, text = apart(recipe, section, setting)
            if word == "done":
                word = "same" if text == plain[1] else "differs"
            yield {"outcome": word, "key": f"{section}.{key}", "setting": setting, "text": text}


def _model(folder: Path, model_type: str) -> None:
    tokens = conftest._byte_level([conftest.END])
    from transformers import PreTrainedTokenizerFast

    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), conftest.END)
    PreTrainedTokenizerFast(tokenizer_object=tokens, **names).save_pretrained(folder / "tokenizer")
    conftest.tiny_model.__wrapped__()(folder / "model", folder / "tokenizer", model_type)  # type: ignore[attr-defined]


def main(model_type: str, section: str, shard: str = "0/1") -> None:
    warnings.filterwarnings("ignore")
    part, parts = map(int, shard.split("/"))
    import sft.train.stage  # noqa: F401  once, for all processes

    with tempfile.TemporaryDirectory() as name:
        making = multiprocessing.get_context("fork").Process(target=_model, args=(Path(name), model_type))
        making.start()  # threads that a model starts here would be lost to the processes below
        making.join()
        for found in fuzz(Path(name), model_type, section, part, parts):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
