"""What a recipe leaves open: chosen by the machine and the rows, said with its reason, and set by hand all the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from sft.recipe import Recipe, load
from sft.train import choices
from sft.train.choices import ByLength, Choice, by_machine, by_rows, row_lengths, settle, waste

LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Callable[..., Path]) -> Callable[..., Recipe]:
    return lambda *overrides: load(write_recipe(tmp_path), overrides)


def of(lengths: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})


def named(chosen: list[Choice]) -> dict[str, Any]:
    return {choice.setting: choice.value for choice in chosen}


def mixed(count: int) -> list[int]:
    return np.random.default_rng(0).integers(20, 200, count).tolist()


def test_rows_of_like_length_share_a_step_and_epochs_differ() -> None:
    lengths = np.array(mixed(1000))
    sampler = ByLength(lengths, step=16, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert {frozenset(first[i : i + 16]) for i in range(0, 992, 16)} != {
        frozenset(second[i : i + 16]) for i in range(0, 992, 16)
    }
    spread = [np.ptp(lengths[first[i : i + 16]]) for i in range(0, 992, 16)]
    assert max(spread) < 25
    means = [lengths[first[i : i + 16]].mean() for i in range(0, 992, 16)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True), "the steps stand in random order"


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    lengths = np.array(mixed(100))
    a, b = ByLength(lengths, 8, 1), ByLength(lengths, 8, 1)
    a.set_epoch(3)
    torch.manual_seed(5)
    np.random.default_rng(7)
    b.set_epoch(3)
    assert list(a) == list(b)
    assert list(a) != list(ByLength(lengths, 8, 2))


def test_the_incomplete_step_is_the_last() -> None:
    lengths = np.arange(1, 20)
    assert len(list(ByLength(lengths, 8, 0))) == 19
    assert sorted(list(ByLength(lengths, 8, 0))[16:]) == [0, 1, 2]


def test_waste_is_the_padding_by_hand() -> None:
    config = AutoConfig.for_model("llama", **(LLAMA | {"hidden_size": 10**9}))  # attention weighs nothing
    assert waste(np.array([10, 30, 20, 20]), 2, config) == pytest.approx(100 / 80 - 1)


def test_lengths_are_those_of_the_rows() -> None:
    assert row_lengths(of([3, 1, 2])).tolist() == [3, 1, 2]


def test_rows_of_several_lengths_are_grouped_and_the_reason_says_what_it_saves(recipe: Any) -> None:
    settled = settle(recipe(), by_machine(recipe()))
    config = AutoConfig.for_model("llama", **LLAMA)
    (choice,) = [c for c in by_rows(settled, of(mixed(400)), config, 1) if c.setting == "train_sampling_strategy"]
    assert choice.value == "group_by_length"
    assert "wastes" in str(choice)
    assert "a random order" in str(choice)


def test_rows_that_grouping_cannot_serve_are_packed_and_as_many_are_learned_from_in_a_step(recipe: Any) -> None:
    """Four long rows among short ones: a step of 8 has to pad to the long ones."""
    few = recipe("trainer.max_length=64", "trainer.per_device_train_batch_size=16")
    config = AutoConfig.for_model("llama", **(LLAMA | {"hidden_size": 2048}))
    lengths = [4] * 28 + [64] * 4
    chosen = named(by_rows(settle(few, by_machine(few)), of(lengths), config, 1))
    assert chosen["packing"] is True
    mean = sum(lengths) / len(lengths)
    rows = chosen["gradient_accumulation_steps"] * chosen["per_device_train_batch_size"] * 64 / mean
    assert rows == pytest.approx(16, rel=0.5)
    four = recipe("trainer.max_length=64", "trainer.per_device_train_batch_size=16",
                  "trainer.gradient_accumulation_steps=4")  # fmt: skip
    alone, two = (named(by_rows(settle(four, by_machine(four)), of(lengths), config, n)) for n in (1, 2))
    assert alone["gradient_accumulation_steps"] == two["gradient_accumulation_steps"] > 1, "each does its own share"
    falcon = AutoConfig.for_model("falcon", hidden_size=2048)
    (choice,) = [c for c in by_rows(few, of(lengths), falcon, 1) if c.setting == "train_sampling_strategy"]
    assert choice.value == "group_by_length"
    assert "falcon is never packed" in choice.reason


def test_one_row_at_a_time_needs_no_order(recipe: Any) -> None:
    one = recipe("trainer.per_device_train_batch_size=1")
    config = AutoConfig.for_model("llama", **LLAMA)
    assert named(by_rows(one, of(mixed(50)), config, 1))["train_sampling_strategy"] == "random"


def test_attention_is_plain_on_a_cpu_for_short_rows_in_bfloat16_alone(recipe: Any) -> None:
    config, key = AutoConfig.for_model("llama", **LLAMA), "model_init_kwargs.attn_implementation"
    assert named(by_rows(recipe("trainer.bf16=true"), of([90, 100]), config, 1))[key] == "eager"
    assert key not in named(by_rows(recipe("trainer.bf16=true"), of([900, 1000]), config, 1))
    assert key not in named(by_rows(recipe("trainer.bf16=false"), of([90, 100]), config, 1))
    wide = AutoConfig.for_model("llama", **(LLAMA | {"num_attention_heads": 64, "num_hidden_layers": 2000}))
    assert key not in named(by_rows(recipe("trainer.bf16=true"), of([90, 100]), wide, 1)), "it would take too much"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bf16", False),
        ("activation_checkpointing", True),
        ("gradient_checkpointing", True),
        ("train_sampling_strategy", "random"),
        ("packing", False),
        ("model_init_kwargs.attn_implementation", "sdpa"),
    ],
)
def test_what_is_set_by_hand_is_not_chosen(recipe: Any, setting: str, value: Any) -> None:
    by_hand = recipe(f"trainer.{setting}={json.dumps(value)}")
    config = AutoConfig.for_model("llama", **LLAMA)
    first = by_machine(by_hand)
    chosen = named(first) | named(by_rows(settle(by_hand, first), of(mixed(50)), config, 1))
    assert setting not in chosen
    also = {"gradient_checkpointing": "activation_checkpointing", "packing": "train_sampling_strategy"}
    assert also.get(setting) not in chosen


def test_a_micro_batch_left_to_auto_is_said_and_the_step_is_kept(recipe: Any) -> None:
    auto = recipe("trainer.per_device_train_batch_size=auto", "trainer.gradient_accumulation_steps=12")
    chosen = named(by_machine(auto))
    assert (chosen["per_device_train_batch_size"], chosen["gradient_accumulation_steps"]) == (6, 2)


def test_fp16_takes_the_place_of_bf16(recipe: Any) -> None:
    assert named(by_machine(recipe("trainer.fp16=true")))["bf16"] is False


def test_checkpointing_on_a_card_is_for_what_does_not_fit_without_it(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path]
) -> None:
    tiny_model(tmp_path / "model", gpt2_like, "llama")
    for card, needed in ((80 * 2**30, False), (2**28, True)):
        monkeypatch.setattr(choices, "card_memory", lambda _, card=card: card)
        (choice,) = [c for c in by_machine(recipe()) if c.setting == "activation_checkpointing"]
        assert choice.value is needed
        assert "of the card's" in choice.reason


def test_choices_are_said_written_down_and_used(
    tmp_path: Path,
    gpt2_like: Path,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sft.train import stage as train

    tiny_model(tmp_path / "model", gpt2_like)
    recipe = load(write_recipe(tmp_path))
    train.train(recipe)
    said = capsys.readouterr().err
    written = json.loads((recipe.folder / "train.json").read_text())["choices"]
    assert {"bf16", "activation_checkpointing", "train_sampling_strategy"} <= {choice["setting"] for choice in written}
    for choice in written:
        assert f"chosen: trainer.{choice['setting']}=" in said
        assert choice["reason"] in said


def test_every_attention_that_may_be_chosen_gives_the_same_logits(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model", gpt2_like)).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.set_attn_implementation("eager")
        assert torch.allclose(before, model(ids).logits, atol=1e-5)


def test_rows_of_almost_one_length_stay_mixed(recipe: Any) -> None:
    settled = settle(recipe(), by_machine(recipe()))
    lengths = np.random.default_rng(0).integers(90, 110, 400).tolist()
    chosen = named(by_rows(settled, of(lengths), AutoConfig.for_model("llama", **LLAMA), 1))
    assert chosen["train_sampling_strategy"] == "random"
