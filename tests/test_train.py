"""Training: the loss by hand, adapters that load, runs that go on after a kill, and processes that add up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROWS, popen
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft import UserError
from sft.model.loss import output_losses, right_padded, supervised_logits
from sft.recipe import Recipe, load
from sft.tokens.opened import Opened
from sft.tokens.prepare import MASKED

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]) -> Any:
    """`run(**changes)` trains the fixture recipe on a tiny model and returns the recipe."""
    from sft.train.stage import train

    def _run(*overrides: str, model_type: str = "gpt2", **changes: Any) -> Recipe:
        if not (tmp_path / "model").exists():
            odd: dict[str, Any] = {"intermediate_size": 172} if model_type == "llama" else {}
            odd |= {"attention_types": [[["global", "local"], 1]]} if model_type == "gpt_neo" else {}
            tiny_model(tmp_path / "model", gpt2_like, model_type, **odd)
        recipe = load(write_recipe(tmp_path, **changes), overrides)
        train(recipe)
        return recipe

    return _run


def adapter(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(recipe.trained / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_adapter_loads_by_itself_with_its_tokenizer_and_was_trained(run: Any) -> None:
    from peft import AutoPeftModelForCausalLM

    recipe = run()
    model = AutoPeftModelForCausalLM.from_pretrained(recipe.trained)
    tokenizer = AutoTokenizer.from_pretrained(recipe.trained)
    ids = tokenizer("Mira", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert not torch.equal(tuned, base)
    record = json.loads((recipe.folder / "train.json").read_text())
    assert record["steps"] == 2
    assert record["versions"]["trl"]
    assert [learned for _, learned in record["example"]] == [False, True]
    assert not (recipe.folder / "checkpoints").exists()


def test_the_loss_is_the_mean_over_supervised_tokens(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m", gpt2_like))
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [MASKED, MASKED, 7, 8, 9]},
        {"input_ids": [5, 6, 7], "labels": [MASKED, 6, MASKED]},
    ]
    logits, targets = supervised_logits(model, right_padded(rows, 0, "cpu"))
    assert targets.tolist() == [7, 8, 9, 6]
    by_hand = []
    for row in rows:
        full = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        by_hand += [-full[i - 1, label].item() for i, label in enumerate(row["labels"]) if label != MASKED]
    assert cross_entropy(logits, targets, reduction="none").tolist() == pytest.approx(by_hand, abs=1e-5)


def test_row_losses_do_not_depend_on_the_batches(run: Any) -> None:
    recipe = run()
    model, rows = AutoModelForCausalLM.from_pretrained(recipe.model), Opened(recipe).tokens.test
    one, many = (output_losses(model, rows, size, 0) for size in (1, 10**6))
    assert [count for _, _, count in one] == [sum(label != MASKED for label in row["labels"]) for row in rows]
    for (a, right_a, _), (b, right_b, _) in zip(one, many, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert abs(right_a - right_b) <= 1


def test_held_out_loss_in_training_is_the_token_mean_of_the_evaluation(run: Any) -> None:
    from eval.evaluate import evaluate_run

    rows = [row | {"output": row["output"] * (1 + i % 5)} for i, row in enumerate(ROWS)]
    recipe = run("trainer.eval_strategy=steps", "trainer.eval_steps=20", "trainer.max_steps=20", "eval.rows=2",
                 "trainer.learning_rate=1e-2", "trainer.bf16=false", "generation.max_new_tokens=4",
                 rows=rows, lora=None)  # fmt: skip
    log = json.loads((recipe.folder / "train.json").read_text())["log"]
    (in_training,) = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    folder = evaluate_run(recipe)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["metrics"]["loss"]["tuned"]["value"] == pytest.approx(in_training, rel=1e-4)
    losses, _, tokens = torch.tensor(json.loads((folder / "tuned" / "losses.json").read_text())).double().T
    assert in_training == pytest.approx(float(losses.sum() / tokens.sum()), rel=1e-4)
    without_one = (losses.sum() - losses) / (tokens.sum() - tokens)
    assert ((without_one / in_training - 1).abs() > 1e-3).all(), "rows differ, so that none can be left out unseen"
    assert abs(float((losses / tokens).mean()) / in_training - 1) > 1e-3, "nor can a mean of rows stand for it"


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_micro_batches_give_the_step_of_one_batch(tmp_path: Path, run: Any, weighted: bool) -> None:
    """Micro-batches have different numbers of learned tokens, so that a mean of their means is another step."""
    rows = [{"prompt": f"{i} Mira", "output": "went to the mill. " * (1 + i % 8)} for i in range(12)]
    (tmp_path / "own.py").write_text(
        "from data_templates import Segment, Template\n"
        "def template(weight: float = 1.0):\n"
        "    return Template(fields={'output': ''}, prompt=lambda r: r['prompt'] + ':', completion=lambda r:\n"
        "        [Segment('first', r['output'][:9], weight), Segment('rest', r['output'][9:])])\n"
    )
    sgd = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "bf16": False}
    options = {"template_options": {"weight": 3.0 if weighted else 1.0}, "lora": {"r": 4, "lora_dropout": 0.0}}
    steps = []
    for size, accumulated in ((9, 1), (3, 3)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated,
                 "train_sampling_strategy": "random"}  # fmt: skip
        recipe = run(f"output={tmp_path / 'runs' / str(size)}", rows=rows, template=str(tmp_path / "own.py"),
                     model_type="llama", trainer=sgd | batch, **options)  # fmt: skip
        steps.append(adapter(recipe))
    assert any(tensor.abs().max() > 1e-4 for name, tensor in steps[0].items() if "lora_B" in name)
    for name, tensor in steps[0].items():
        torch.testing.assert_close(tensor, steps[1][name], rtol=1e-3, atol=1e-6)


def test_segment_weights_reach_the_loss(tmp_path: Path, run: Any) -> None:
    """One step of plain SGD at learning rate 1 moves a parameter by minus its gradient: compare with autograd."""
    (tmp_path / "weighted.py").write_text(
        "from data_templates import Segment, Template\n"
        "def template(weight: float = 3.0):\n"
        "    return Template(fields={'output': ''}, prompt=lambda r: r['prompt'] + ':', completion=lambda r:\n"
        "        [Segment('old', r['output'][:20]), Segment('new', r['output'][20:], weight),\n"
        "         Segment('no', ' x', 0)])\n"
    )
    sgd = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.0,
           "max_grad_norm": 1e9, "bf16": False, "per_device_train_batch_size": 32}  # fmt: skip
    recipe = run(template=str(tmp_path / "weighted.py"), lora=None, trainer=sgd)
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (recipe.model, recipe.trained))
    rows = Opened(recipe).tokens.train
    before.train()
    for module in before.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = before(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        learned = [(i, w) for i, w in enumerate(row["weights"]) if w]
        assert {w for _, w in learned} == {1, 3}
        total = total - sum(w * logits[i - 1, row["input_ids"][i]] for i, w in learned)
        count += len(learned)
    (total / count).backward()
    name = "transformer.h.1.mlp.c_fc.weight"
    step = (before.get_parameter(name) - after.get_parameter(name)).flatten()
    gradient = before.get_parameter(name).grad.flatten()
    assert torch.cosine_similarity(step, gradient, dim=0) > 0.98  # dropout of the tiny model makes the rest


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["c_attn"]}])
def test_variants_of_lora_train(run: Any, kind: dict[str, Any]) -> None:
    weights = adapter(run(lora=kind))
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_a_target_that_names_no_layer_is_an_error(run: Any) -> None:
    with pytest.raises(UserError, match=r"`lora.target_modules` names `q_proj`.*there are .*c_attn"):
        run(lora={"target_modules": ["c_attn", "q_proj"]})


def test_more_tokens_than_positions_are_an_error(run: Any) -> None:
    with pytest.raises(UserError, match=r"`trainer.max_length` is 257, .* has 256 positions"):
        run(trainer={"max_length": 257})


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains_on_cpu_with_an_adapter_in_fp32(run: Any, bits: str) -> None:
    from eval.evaluate import evaluate_run

    few = {"eval": {"rows": 2}, "generation": {"max_new_tokens": 4}}
    recipe = run(model_type="llama", quantization=bits, trainer={"eval_strategy": "steps", "eval_steps": 1}, **few)
    assert (evaluate_run(recipe) / "scores.json").is_file(), "the sizes of this model's layers are no powers of two"
    weights = adapter(recipe)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_gradients_of_a_4bit_model_survive_an_evaluation(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> None:
    from sft.model.adapter import add_adapter
    from sft.model.load import load_base

    tiny_model(tmp_path / "model", gpt2_like, "llama", hidden_size=128, intermediate_size=256)
    recipe = load(write_recipe(tmp_path, quantization="4bit"))
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    model = add_adapter(load_base(recipe, tokenizer, training=True), recipe)
    ids = torch.arange(5, 100)[None]

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    assert torch.equal(before, gradient())


def test_a_model_of_which_nothing_is_quantised_is_refused(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> None:
    from sft.train.stage import train

    tiny_model(tmp_path / "model", gpt2_like, "falcon")
    with pytest.raises(UserError, match="no layer to quantise"):
        train(load(write_recipe(tmp_path, quantization="4bit")))


@pytest.mark.parametrize("dora", [False, True])
def test_leaving_out_copies_of_what_lora_is_given_changes_no_gradient(
    dora: bool, tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path]
) -> None:
    from sft.model.adapter import without_copies

    base = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m", gpt2_like, "llama"), dtype=torch.bfloat16)
    lora: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "use_dora": dora}
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora))
    args: Any = SimpleNamespace(bf16=True, device=torch.device("cpu"))
    recipe: Any = SimpleNamespace(lora=lora)
    ids, gradients = torch.arange(5, 45).reshape(2, 20), []
    for copies in (nullcontext(), without_copies(recipe, model, args)):
        model.zero_grad()
        with copies, torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert same(*gradients)


def test_packing_is_proven_before_it_is_used(run: Any, tmp_path: Path) -> None:
    """The same Llama passes, and fails where it is made blind to where documents begin."""
    from trl import pack_dataset

    from sft.train.packing import prove_packing

    recipe = run(model_type="llama", trainer={"packing": True})
    assert adapter(recipe)
    model = AutoModelForCausalLM.from_pretrained(recipe.model)
    rows = pack_dataset(Opened(recipe).tokens.train, recipe.max_length, "bfd")
    prove_packing(model, rows, 4)

    def run_on(_module: Any, arguments: Any, inputs: dict[str, Any]) -> Any:
        return arguments, inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}

    model.register_forward_pre_hook(run_on, with_kwargs=True)
    with pytest.raises(UserError, match="packing is not safe for this architecture"):
        prove_packing(model, rows, 4)


def test_a_document_that_loses_its_first_token_to_packing_is_noticed(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path]
) -> None:
    """No document sees another here, but a packed one is not what it is alone."""
    from datasets import Dataset

    from sft.train.packing import prove_packing

    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m", gpt2_like, "llama"))
    rows = Dataset.from_list([{"input_ids": list(range(5, 45)), "seq_lengths": [20, 20]}])

    def forget_the_first(_module: Any, arguments: Any, inputs: dict[str, Any]) -> Any:
        first = inputs["position_ids"] == 0
        first[:, 0] = False  # of the row's first document all is there
        return arguments, inputs | {"input_ids": inputs["input_ids"].masked_fill(first, 7)}

    prove_packing(model, rows, 1)
    model.register_forward_pre_hook(forget_the_first, with_kwargs=True)
    with pytest.raises(UserError, match="packing is not safe for this architecture"):
        prove_packing(model, rows, 1)


def test_an_architecture_that_leaks_between_packed_rows_is_refused(run: Any) -> None:
    with pytest.raises(UserError, match="packing is not safe for this architecture"):
        run(model_type="falcon", trainer={"packing": True})


@pytest.mark.parametrize("model_type", ["bloom", "gpt_neo"])
def test_packing_is_refused_where_it_leaks_a_little_or_fails_in_a_batch(run: Any, model_type: str) -> None:
    with pytest.raises(UserError, match=r"packing is not safe|a packed batch fails"):
        run(model_type=model_type, trainer={"packing": True, "per_device_train_batch_size": 8})


def test_a_diverged_model_is_never_saved(run: Any, tmp_path: Path) -> None:
    wild = {
        "learning_rate": 1e30,
        "max_grad_norm": 0.0,
        "logging_steps": 100,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
    }
    with pytest.raises(UserError, match=r"is not finite after step 6; lower `trainer\.learning_rate`"):
        run(trainer=wild)
    assert not (tmp_path / "runs" / "run" / "adapter").exists()


def test_a_base_that_was_trained_anew_is_noticed(run: Any, tmp_path: Path) -> None:
    run()
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8:] = bytes(8)  # the same name and size, other weights
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"holds another run .on another base"):
        run()


def test_a_damaged_adapter_is_told_and_not_used(run: Any) -> None:
    file = run().trained / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: missing, or not of the size it was written with"):
        run()


def test_rows_with_and_without_weights_train_together(tmp_path: Path, run: Any) -> None:
    (tmp_path / "mixed.py").write_text(
        "from data_templates import Segment, Template\n"
        "def template():\n"
        "    return Template(fields={'output': ''}, prompt=lambda r: r['prompt'] + ':', completion=lambda r:\n"
        "        [Segment('all', r['output'], 2.0 if 'Mira' in r['prompt'] else 1.0)])\n"
    )
    recipe = run(template=str(tmp_path / "mixed.py"))
    counts = json.loads((recipe.folder / "train.json").read_text())["counts"]["train"]
    assert 0 < counts["weighted"] < counts["rows"]


def test_a_run_does_not_go_on_with_another_number_of_processes(run: Any, tmp_path: Path) -> None:
    from sft.train.checkpoints import last_whole_checkpoint as _last_whole_checkpoint

    folder = tmp_path / "checkpoints" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    (folder / "whole.json").write_text('{"processes": 2, "files": {"weights": 1}}')
    assert _last_whole_checkpoint(folder.parent, 2) == str(folder)
    with pytest.raises(UserError, match="was written by 2 processes and would go on with 1"):
        _last_whole_checkpoint(folder.parent, 1)


def test_a_finished_run_is_left_alone_and_another_recipe_is_kept_out(run: Any) -> None:
    recipe = run()
    written = (recipe.trained / "adapter_model.safetensors").stat().st_mtime_ns
    run()
    assert (recipe.trained / "adapter_model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"holds another run \(`lora.r` was 4, now 8\)"):
        run(lora={"r": 8})


def test_the_resolved_recipe_gives_the_same_adapter(tmp_path: Path, run: Any) -> None:
    from sft.train.stage import train

    first = run()
    again = load(first.folder / "recipe.yaml", [f"output={tmp_path / 'runs' / 'again'}"])
    train(again)
    assert same(adapter(first), adapter(again))


def test_a_recipe_tunes_on_top_of_another_one(
    tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.cli import main
    from sft.train.stage import train

    texts = [{"text": f"{i} Mira went to the mill and found a lantern."} for i in range(20)]
    (tmp_path / "base").mkdir()
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 256}
    base = write_recipe(tmp_path / "base", texts, model=config, tokenizer={"vocab_size": 300}, lora=None,
                        template="running_text", trainer={"packing": True})  # fmt: skip
    top = load(write_recipe(tmp_path, model=str(base)))
    with pytest.raises(UserError, match="not trained yet"):
        train(top)
    assert main(["bases", str(tmp_path / "recipe.yaml")]) == 0
    assert capsys.readouterr().out.split() == [str(base), str(tmp_path / "recipe.yaml")]
    train(load(base))
    train(top)
    assert json.loads((top.trained / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        load(base).trained
    )


# whole processes


def start(recipe_file: Path, *arguments: str, launcher: list[str] | None = None, **env: str) -> subprocess.Popen[str]:
    command = [*(launcher or [sys.executable]), "-m", "sft", "train", str(recipe_file), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return popen(command, cwd=ROOT, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_a_run_killed_in_the_middle_goes_on_to_the_same_adapter(
    tmp_path: Path,
    gpt2_like: Path,
    tiny_model: Callable[..., Path],
    write_recipe: Callable[..., Path],
    quantization: str,
) -> None:
    tiny_model(tmp_path / "model", gpt2_like, "llama")
    steps = {"max_steps": 12, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    file = write_recipe(tmp_path, quantization=quantization, lora={"r": 4, "lora_dropout": 0.1}, trainer=steps)
    finish(start(file, f"output={tmp_path / 'runs' / 'whole'}"))
    killed = start(file)
    marker = tmp_path / "runs" / "run" / "checkpoints" / "checkpoint-6" / "whole.json"
    deadline = time.monotonic() + 240
    while not marker.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert marker.exists()
    assert not (tmp_path / "runs" / "run" / "adapter").exists(), "it ended before it could be killed"
    half = marker.parents[1] / "checkpoint-99"  # as a run leaves it that is killed while writing
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    assert "going on from" in finish(start(file))
    assert same(adapter(load(file)), adapter(load(file, [f"output={tmp_path / 'runs' / 'whole'}"])))


@pytest.mark.slow
def test_two_processes_give_the_adapter_of_one_with_twice_the_accumulation(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> None:
    tiny_model(tmp_path / "model", gpt2_like, "llama")
    file = write_recipe(tmp_path, trainer={"per_device_train_batch_size": 2, "bf16": False, "max_steps": 3})
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    two = [
        accelerate,
        "launch",
        "--main_process_port",
        "0",
        "--config_file",
        "recipes/accelerate/several_processes.yaml",
    ]
    finish(start(file, launcher=two, PROCESSES="2"))
    other = f"output={tmp_path / 'runs' / 'one'}"
    finish(start(file, "trainer.gradient_accumulation_steps=2", other))
    one = adapter(load(file, [other]))
    assert json.loads((tmp_path / "runs" / "run" / "train.json").read_text())["processes"] == 2
    for name, tensor in adapter(load(file)).items():
        assert torch.allclose(tensor, one[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_a_launcher_that_runs_fewer_processes_than_asked_for_is_an_error(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> None:
    tiny_model(tmp_path / "model", gpt2_like)
    process = start(write_recipe(tmp_path), PROCESSES="2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "2 processes were asked for, but 1 run" in errors


@pytest.mark.slow
def test_an_interrupt_ends_with_a_message_and_nothing_half_written(
    tmp_path: Path, gpt2_like: Path, tiny_model: Callable[..., Path], write_recipe: Callable[..., Path]
) -> None:
    tiny_model(tmp_path / "model", gpt2_like)
    process = start(write_recipe(tmp_path, trainer={"max_steps": 100000, "logging_steps": 1}))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from its last whole checkpoint" in errors
    assert "Traceback" not in errors
    assert not [*(tmp_path / "runs").rglob("*.part")]


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "bar"), [("none", 2.8), ("4bit", 2.9)])
def test_a_real_pretrained_model_learns_real_tales(
    tmp_path: Path, real_data: Path, quantization: str, bar: float
) -> None:
    """The story recipe by overrides, as in the README: held-out loss on outputs falls from about 3.4 below the bar."""
    tales = real_data / "datasets" / "fairytale_continuation"
    recipe = load(
        ROOT / "recipes" / "story_gpt2_lora.yaml",
        [
            f"model={real_data / 'models' / 'stories260K'}",
            f"data.train={tales / 'train.jsonl'}",
            f"data.test={tales / 'test.jsonl'}",
            f"quantization={quantization}",
            "check.max_dropped=0.3",
            "trainer.max_steps=60",
            "trainer.learning_rate=5e-3",
            "trainer.per_device_train_batch_size=16",
            "trainer.gradient_accumulation_steps=1",
            "trainer.eval_steps=60",
            "trainer.eval_on_start=true",
            f"output={tmp_path / 'runs' / 'tales'}",
        ],
    )
    from sft.train.stage import train

    train(recipe)
    log = json.loads((recipe.folder / "train.json").read_text())["log"]
    before, after = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert after < bar < 3.2 < before
