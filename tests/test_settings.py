"""A setting that a library would drop or choke on is reported before anything is read, loaded or trained."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from settings_fuzz import NO_TRACE, NOT_TRIED

from sft.cli import main
from sft.recipe import load
from sft.recipe.checks import OWNED, judged_by_their_bounds
from sft.recipe.fields import LIBRARIES

ADAPTER: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj"], "layers_to_transform": [0, 99]}, "`lora.layers_to_transform` names layer 99; the"),
    ({"target_modules": ["q_proj"], "layers_to_transform": 7}, "`lora.layers_to_transform` names layer 7; there are 0"),
    ({"target_modules": ["q_proj"], "layers_to_transform": []}, "`lora.layers_to_transform` is empty; "),
    ({"layers_to_transform": [0]}, "`lora.layers_to_transform` needs a list in `lora.target_modules`, such as [down_"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "blocks"]},
     "`lora.layers_pattern` names `blocks`, under which no layer gets LoRA"),
    ({"target_modules": "q_proj"}, "`lora.target_modules` is `q_proj`, a pattern for whole paths such as model.layer"),
    ({"target_modules": ["q_proj", "c_attn"]}, "`lora.target_modules` names `c_attn`, which this model does not have;"),
    ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
     "`lora.target_modules` names `v_proj`, and the rest of `lora:` leaves none of these layers"),
    ({"target_modules": "("}, "`lora.target_modules` holds `(`, which is not a regular expression: missing )"),
    ({"exclude_modules": ["lm_head"]}, "`lora.exclude_modules` has `lm_head`, which gets no LoRA in any case"),
    ({"exclude_modules": ".*"}, "`lora.exclude_modules` is not accepted by peft: All modules were excluded."),
    ({"rank_pattern": {"c_attn": 8}}, "`lora.rank_pattern` has `c_attn`, which fits no layer with LoRA"),
    ({"rank_pattern": {".*_proj": 8, "q_proj": 2}}, "`lora.rank_pattern` has `q_proj`, which fits no layer with LoRA"),
    ({"rank_pattern": {"q_proj": 0.5}}, "`lora.rank_pattern` gives `q_proj` the value 0.5; it takes a whole number"),
    ({"alpha_pattern": {"c_attn": 8}}, "`lora.alpha_pattern` has `c_attn`, which fits no layer with LoRA"),
    ({"modules_to_save": ["act_fn"]}, "`lora.modules_to_save` names `act_fn`, which holds no weights"),
    ({"trainable_token_indices": [100000]}, "`lora.trainable_token_indices` holds 100000; this model's token ids are"),
    ({"trainable_token_indices": {"wte": [1]}}, "`lora.trainable_token_indices` names `wte`, which this model does"),
    ({"trainable_token_indices": {"norm": [1]}}, "`lora.trainable_token_indices` is not accepted by peft"),
    ({"target_parameters": ["q_proj.wait"], "target_modules": []}, "`lora.target_parameters` names `q_proj.wait`, wh"),
    ({"layer_replication": [[0, 99]]}, "`lora.layer_replication` is not accepted by peft: index 2 is out of range"),
    ({"ensure_weight_tying": True}, "`lora.ensure_weight_tying` changes nothing"),
    ({"target_modules": ["lm_head"]}, "`lora.target_modules` gives LoRA to the head, whose weight the loss reads"),
    ({"velora_config": {"num_grups": 4}}, "unknown key `num_grups` under `lora.velora_config`, which has num_groups"),
    ({"use_bdlora": {"target_modules_bd_a": ["c_attn"], "match_strict": False}},
     "`lora.use_bdlora.target_modules_bd_a` names `c_attn`, and no layer with LoRA has that in its path"),
    ({"r": 1000}, "`lora.r` is 1000; no layer here has a rank above 32"),
]  # fmt: skip
TRAINER: list[tuple[dict[str, Any], str]] = [
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "`trainer.lr_scheduler_type` is not accepted by transformers: One"),
    ({"lr_scheduler_kwargs": {"min_lr": 1}}, "`trainer.lr_scheduler_kwargs` is not accepted by transformers: get_lin"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "`trainer.lr_scheduler_kwargs` change nothi"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "`trainer.warmup_steps` changes nothing with `trainer.lr_"),
    ({"report_to": "wandb"}, "`trainer.report_to` is not accepted by transformers: WandbCallback requires wandb"),
    ({"report_to": ["none", "wandbx"]}, "`trainer.report_to` is not accepted by"),
    ({"optim": "galore_adamw"}, "`trainer.optim` is not accepted by transformers: You need to install `galore_torch`"),
    ({"optim": "adam"}, "`trainer.optim` is not accepted by trl.SFTConfig: adam is not a valid OptimizerNames"),
    ({"optim": "sgd", "adam_beta1": 0.5}, "`trainer.adam_beta1` changes nothing with `trainer.optim: sgd`"),
    ({"optim_args": "rank=3"}, "`trainer.optim_args` changes nothing with `trainer.optim: adamw_torch"),
    ({"activation_checkpointing_kwargs": {"a": 1}}, "`trainer.activation_checkpointing_kwargs` is not accepted by tr"),
    ({"activation_checkpointing_kwargs": "a"}, "`trainer.activation_checkpointing_kwargs` is 'a'; it takes a mapping"),
    ({"torch_compile_mode": "fastest"}, "`trainer.torch_compile_mode` is not accepted by transformers: Unrecognized"),
    ({"log_level": "loud"}, "`trainer.log_level` is 'loud'; write one of 'passive', 'debug', 'info'"),
    ({"loss_type": "mse"}, "`trainer.loss_type` is 'mse'; write one of 'nll', 'dft', 'chunked_nll'"),
    ({"metric_for_best_model": "bleu"}, "`trainer.metric_for_best_model` is 'bleu'; write one of loss, perplexity,"),
    ({"save_strategy": "best"}, "`trainer.save_strategy: best` needs `trainer.metric_for_best_model`"),
    ({"router_aux_loss_coef": 0.5}, "`trainer.router_aux_loss_coef` is for mixtures of experts"),
    ({"dataloader_prefetch_factor": 2}, "`trainer.dataloader_prefetch_factor` changes nothing without `trainer.data"),
    ({"dataloader_num_workers": -1}, "`trainer.dataloader_num_workers` is -1; it takes a whole number from 0 to 1024"),
    ({"adam_beta1": 1.5}, "`trainer.adam_beta1` is not accepted by transformers: Invalid beta parameter at index 0"),
]  # fmt: skip
GENERATION: list[tuple[dict[str, Any], str]] = [
    (
        {"prompt_lookup_num_tokens": 1},
        "`prompt_lookup_num_tokens` cannot be set under `generation`: the model writes by",
    ),
    (
        {"bad_words_ids": [3]},
        "`generation.bad_words_ids` is not accepted by transformers: `bad_words_ids` has to be a li",
    ),
    ({"suppress_tokens": [10**6]}, "`generation.suppress_tokens` names token 1000000; the ids here are 0 to"),
    ({"suppress_tokens": ["a"]}, "`generation.suppress_tokens` names token 'a'; the ids here are 0 to"),
    ({"early_stopping": "maybe"}, "`generation.early_stopping` is not accepted by transformers"),
    (
        {"exponential_decay_length_penalty": ["a"]},
        "`generation.exponential_decay_length_penalty` is not accepted by tra",
    ),
    ({"min_new_tokens": "a"}, "`generation.min_new_tokens` is 'a'; it takes a whole number"),
    ({"length_penalty": 2.0}, "`generation.length_penalty` is not accepted by transformers"),
]


@pytest.fixture
def llama(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> Callable[..., Path]:
    """`llama(**changes)`: a recipe on a tiny llama without weights, so that nothing can be trained by accident."""

    def write(model_type: str = "llama", **changes: Any) -> Path:
        for weights in tiny_model(tmp_path / "model", gpt2_like, model_type).glob("*.safetensors"):
            weights.unlink()
        return write_recipe(tmp_path, **changes)

    return write


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (section, *case)
        for section, cases in (("lora", ADAPTER), ("trainer", TRAINER), ("generation", GENERATION))
        for case in cases
    ],
)
def test_what_a_library_would_drop_or_choke_on_is_reported_before_a_row_is_read(
    llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    section: str, settings: dict[str, Any], message: str, command: str,
) -> None:  # fmt: skip
    (tmp_path / "broken_rows.jsonl").write_text("{")
    recipe = llama(data={"train": str(tmp_path / "broken_rows.jsonl")}, **{section: settings})
    assert main([command, str(recipe)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "broken_rows" not in error


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("llama", {"lora_bias": True}, "the base layer has no bias"),
        ("llama", {"layer_replication": [[0, 2], [1, 2]]}, "one weight in several layers"),
    ],
)
def test_an_adapter_that_will_not_merge_is_reported_before_it_is_trained(
    llama: Any, capsys: pytest.CaptureFixture[str], model_type: str, settings: dict[str, Any], reason: str
) -> None:
    assert main(["check", str(llama(model_type, lora=settings))]) == 0
    error = capsys.readouterr().err
    assert "can be trained and used beside its base, and cannot be merged: " in error
    assert reason in error


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_a_loss_of_trl_is_refused_for_a_head_of_which_single_tokens_are_trained(
    llama: Any, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    assert main(["check", str(llama("gpt2", lora={"trainable_token_indices": [3]}, trainer=settings))]) == 2
    assert "does not go with `lora.trainable_token_indices` in the head" in capsys.readouterr().err
    assert main(["check", str(llama("llama", lora={"trainable_token_indices": [3]}, trainer=settings))]) == 0


def test_a_training_without_a_step_is_refused_before_weights_are_loaded(
    llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = llama(trainer={"dataloader_drop_last": True, "per_device_train_batch_size": 64})
    assert main(["train", str(recipe)]) == 2
    assert "`trainer.dataloader_drop_last` leaves no step: a batch is 64 rows, and there" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"modules_to_save": ["wte"]}, {"trainable_token_indices": [3, 4]}])
def test_a_trained_embedding_beside_a_base_in_bf16_trains(
    tmp_path: Path, gpt2_like: Path, tiny_model: Any, write_recipe: Any, settings: dict[str, Any]
) -> None:
    tiny_model(tmp_path / "model", gpt2_like)
    assert main(["train", str(write_recipe(tmp_path, lora=settings, trainer={"bf16": True}))]) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": r".*\.1\..*_proj"},
        {"exclude_modules": ["v_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.self_attn.v_proj": 0.5}},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4]},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    ],
)
def test_names_patterns_and_indices_that_hit_are_accepted(
    llama: Any, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    assert main(["check", str(llama(lora=settings))]) == 0
    assert "cannot be merged" not in capsys.readouterr().err


def test_an_empty_lora_is_refused_and_one_by_default_is_not(llama: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = llama()
    recipe.write_text(recipe.read_text().replace("lora:\n  r: 4", "lora:"))
    assert main(["check", str(recipe)]) == 2
    assert "`lora` is empty; write `lora: {}` for peft's defaults, or take the key away" in capsys.readouterr().err
    assert load(recipe, ["lora={}"]).has_adapter
    assert not load(recipe, ["lora=null"]).has_adapter


def test_a_setting_is_judged_by_its_bounds_where_a_library_would_say_no_more(llama: Any) -> None:
    recipe = llama(trainer={"lr_scheduler_type": "cosine"}, generation={"temperature": 0.5, "do_sample": True})
    plain = load(recipe, ["trainer={max_steps: 2, lr_scheduler_type: cosine}"])
    assert judged_by_their_bounds(plain)
    for more in ("trainer.lr_scheduler_type=constant", "lora.use_dora=true", "generation.num_beams=2"):
        assert not judged_by_their_bounds(load(recipe, ["trainer={max_steps: 2}", more])), more


def test_a_model_out_of_reach_is_said_and_the_rows_are_checked(
    tmp_path: Path, gpt2_like: Path, write_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write_recipe(tmp_path, model=str(gpt2_like), lora={"use_dora": True}))]) == 0
    said = capsys.readouterr()
    assert "not checked against the model: " in said.err
    assert "rows" in said.out


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["gpt2 lora 0/1", "llama generation 0/1", "llama trainer 0/2", "llama trainer 1/2"])
def test_each_setting_alone_trains_or_is_refused_and_none_is_without_effect(shard: str) -> None:
    script = Path(__file__).with_name("settings_fuzz.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), *shard.split()]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = [json.loads(line) for line in printed.splitlines()]
    assert len(found) > 40
    assert [one for one in found if one["outcome"] in ("traceback", "hung")] == []
    assert [one["setting"] for one in found if one["outcome"] == "same" and one["key"] not in NO_TRACE] == []
    unnamed = [one for one in found if one["outcome"] == "refused" and one["key"].split(".")[1] not in one["text"]]
    assert unnamed == [], "a message names the key"


def test_settings_that_leave_no_trace_are_settings_that_are_there() -> None:
    for name in (*NO_TRACE, *NOT_TRIED):
        section, key = name.split(".")
        assert key in LIBRARIES[section](), name
        assert key not in OWNED[section], name
