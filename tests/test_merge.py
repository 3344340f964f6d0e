"""The merged folder: through the disk, without PEFT, it is the model that was trained; or it says that it is not."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.score import score
from sft import UserError
from sft.cli import main
from sft.files import checksums, read_json, sizes, write_json
from sft.merge import UNEQUAL, MergeOptions, merge, merge_several
from sft.model.adapter import MIX_METHODS, Mix
from sft.recipe import Recipe, dump, load
from sft.rows.read import load_python
from sft.tokens.opened import Opened

ROOT = Path(__file__).parents[1]
bench: Any = load_python(ROOT / "bench" / "parity.py")
CASES = bench.cases()
QUICK = {("llama", "none"), ("gpt2", "4bit")}
"""Of the cases, those that `-m "not slow"` tries too."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one small Llama: `adapter.yaml`, trained in 4 bits into `4bit`; and LoRA into `lora`, on the same base."""
    folder = tmp_path_factory.mktemp("merge")
    bench.trained(folder, CASES["llama", "4bit"], "4bit", steps=30)
    from sft.train.stage import train

    train(load(folder / "adapter.yaml", ["quantization=none", f"output={folder / 'lora'}"]))
    return folder


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each architecture, so that its quantisations share a base."""
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[[str], Recipe]:
    """`copied("lora")` is a copy of that run, for a test to spoil."""

    def copy(name: str) -> Recipe:
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("merged"))
        recipe = load(tmp_path / name, [f"output={tmp_path / name}"])
        (tmp_path / name / "recipe.yaml").write_text(dump(recipe))
        return recipe

    return copy


def spoil(recipe: Recipe, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a run's adapter, and say that they were trained so."""
    file = recipe.trained / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    trained = read_json(recipe.folder / "train.json")
    trained |= {"files": sizes(recipe.trained), "sha256": checksums(recipe.trained)}
    write_json(recipe.folder / "train.json", trained)


def parity_of(folder: Path) -> dict[str, Any]:
    parity: dict[str, Any] = read_json(folder / "parity.json")
    return parity


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_every_architecture_is_the_trained_model_after_merging_saving_and_loading(
    architectures: Path, kind: str, quantization: str
) -> None:
    place = architectures / f"{kind}-{CASES[kind, quantization].get('hidden_act')}"  # recipes of one kind may differ
    place.mkdir(exist_ok=True)
    recipe = bench.trained(place, CASES[kind, quantization], quantization, steps=6, rows=60)
    folder = merge(recipe, MergeOptions(dtype="float32"))
    parity = parity_of(folder)
    assert parity["problems"] == []
    assert not (folder / UNEQUAL).exists()
    assert parity["folder"]["rounding"]["positions"] > 1000
    assert parity["folder"]["layers"] >= 4, "a sum was tried in every layer that has an adapter"
    assert parity["folder"]["sum_error"] < 1e-5
    assert parity["folder"]["rounding"]["largest_logit_difference"] < 1e-4
    if quantization == "4bit":
        assert in_exact_arithmetic(recipe, folder) < 1e-3  # what is left above are the bfloat16 sums of 4-bit layers


@torch.no_grad()
def in_exact_arithmetic(recipe: Recipe, folder: Path) -> float:
    """Largest difference of a logit where the 4-bit layers of the trained model compute in float32."""
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel

    from sft.model.load import load_base

    base = load_base(recipe, Opened(recipe).tokenizer, training=True)
    layers = [layer for layer in base.modules() if isinstance(layer, Linear4bit)]
    assert layers
    for layer in layers:
        layer.compute_dtype = torch.float32
    trained = PeftModel.from_pretrained(base, str(recipe.trained)).eval()
    ids = torch.arange(40, 140)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder)
    return float((merged(ids).logits - trained(ids).logits).abs().max())


def test_the_folder_opens_without_peft_and_is_prompted_as_it_was_trained(runs: Path) -> None:
    base = checksums(runs / "base" / "model")
    folder = merge(load(runs / "adapter.yaml"))
    assert checksums(runs / "base" / "model") == base, "weights are written over in memory alone"
    script = (
        "import json, sys; sys.modules['peft'] = sys.modules['bitsandbytes'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "turns = [{'role': 'user', 'content': 'Once upon a time'}]\n"
        "ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors='pt')\n"
        "print(json.dumps([ids['input_ids'].tolist(), model.generate(**ids).tolist(), str(model.dtype)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prompt, written, dtype = json.loads(done.stdout)
    from sft.tokens.codec import Codec

    assert prompt == Codec(AutoTokenizer.from_pretrained(folder), "plain").prompts(["Once upon a time"])
    assert written[0][: len(prompt[0])] == prompt[0]
    assert len(written[0]) > len(prompt[0])
    assert dtype == "torch.float16", "half of its base's, and the whole gain"


def test_what_is_there_is_kept_where_it_fits_and_replaced_whole_where_it_does_not(
    copied: Callable[[str], Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copied("lora")
    folder = merge(recipe)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    merge(recipe)
    assert "up to date" in capsys.readouterr().err
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    merge(recipe)
    assert (folder / "model.safetensors").read_bytes() == weights
    merge(recipe, MergeOptions(dtype="bfloat16", shard="100KB"))
    assert not (folder / "model.safetensors").exists()
    assert len([*folder.glob("model-*.safetensors")]) > 2
    assert parity_of(folder)["dtype"] == "bfloat16"
    spoil(recipe, lambda tensors: {name: tensor * 0.5 for name, tensor in tensors.items()})
    merge(recipe, MergeOptions(dtype="bfloat16", shard="100KB"))
    assert "up to date" not in capsys.readouterr().err
    assert parity_of(folder)["problems"] == []


def test_the_original_route_is_not_the_trained_model_and_says_so(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(runs / "adapter.yaml"), "--output", str(tmp_path / "m"), "--route", "original"]
    assert main(arguments) == 1
    assert "is not the trained model: its weights are" in capsys.readouterr().err
    assert "of the logits' spread from the trained model, where" in (tmp_path / "m" / UNEQUAL).read_text()
    assert main(arguments) == 1, "nor is it on a second look"
    assert main(["merge", str(runs / "adapter.yaml"), "--output", str(tmp_path / "m")]) == 0
    assert not (tmp_path / "m" / UNEQUAL).exists()


def test_scores_of_both_are_compared_row_by_row(runs: Path, tmp_path: Path) -> None:
    recipe = load(runs / "lora" / "recipe.yaml", ["generation.max_new_tokens=4", "eval.rows=2"])
    scores = parity_of(merge(recipe, MergeOptions(score=True), tmp_path / "m", score))["scores"]
    assert scores["generated"] == 2
    for metric in ("loss", "rougeL", "chrf"):
        assert abs(scores["metrics"][metric]["difference"]["value"]) < 1e-4


def test_the_report_shows_how_far_the_merged_model_is(copied: Callable[[str], Recipe]) -> None:
    from eval.evaluate import evaluate_run
    from eval.report import report

    recipe = copied("lora").model_copy(update={"generation": {"max_new_tokens": 2}})
    evaluate_run(recipe)
    assert "The merged model" not in report(recipe).read_text("utf-8")
    merge(recipe)
    page = report(recipe).read_text("utf-8")
    assert "gain kept (95 % interval)" in page
    assert "100.0% (" in page
    assert "is not the trained model" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
        {"trainable_token_indices": {"embed_tokens": list(range(40, 140))}},
    ],
)
def test_every_kind_of_adapter_merges(runs: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    from sft.train.stage import train

    settings = [f"lora.{key}={json.dumps(value)}" for key, value in lora.items()]
    recipe = load(
        runs / "adapter.yaml", ["quantization=none", "trainer.max_steps=3", f"output={tmp_path / 'run'}", *settings]
    )
    train(recipe)
    assert parity_of(merge(recipe))["problems"] == []


def test_the_sum_of_base_and_adapter_is_rounded_once(
    runs: Path, copied: Callable[[str], Recipe], tmp_path: Path
) -> None:
    """The base is stored in float32: rounded before it is added to, or the product of the adapter's halves in bfloat16,
    it would be another sum."""
    small = trained_on(stored_in(torch.bfloat16, runs, tmp_path), runs, tmp_path, "trainer.max_steps=3")
    layer = "model.layers.1.mlp.up_proj"
    for recipe in (copied("lora"), small):
        halves = load_file(recipe.trained / "adapter_model.safetensors")
        a, b = (halves[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
        config = json.loads((recipe.trained / "adapter_config.json").read_text())
        source = recipe.base.trained if recipe.base else Path(str(recipe.model))
        base = load_file(source / "model.safetensors")[f"{layer}.weight"]
        exact = (base.float() + config["lora_alpha"] / config["r"] * b @ a).bfloat16()
        folder = merge(recipe, MergeOptions(dtype="bfloat16"))
        assert torch.equal(load_file(folder / "model.safetensors")[f"{layer}.weight"], exact)


def stored_in(dtype: torch.dtype, runs: Path, place: Path, times: float = 1.0) -> Path:
    """The base of the runs, stored in another dtype; and with a residual stream so many times as large, which RMSNorm
    takes away again, so that it is the same model."""
    shutil.copytree(runs / "base" / "model", place / "stored")
    weights = load_file(place / "stored" / "model.safetensors")
    grown = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
    weights = {n: (w * times if n.endswith(grown) else w).to(dtype) for n, w in weights.items()}
    save_file(weights, place / "stored" / "model.safetensors", {"format": "pt"})
    config = read_json(place / "stored" / "config.json")
    write_json(place / "stored" / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    return place / "stored"


def trained_on(base: Path, runs: Path, place: Path, *overrides: str) -> Recipe:
    from sft.train.stage import train

    own = [f"model={base}", "quantization=none", "prompt_format=plain", f"output={place / 'run'}"]
    recipe = load(runs / "adapter.yaml", [*own, *overrides])
    train(recipe)
    return recipe


def test_a_dtype_that_loses_the_gain_is_passed_over(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small adapter is finer than bfloat16; float16 is as small, and keeps it."""
    recipe = trained_on(stored_in(torch.bfloat16, runs, tmp_path), runs, tmp_path, "trainer.learning_rate=6e-5")
    folder = merge(recipe)
    parity = parity_of(folder)
    assert parity["problems"] == []
    assert parity["dtype"] == "float16"
    assert "its weights keep" in parity["refused"]["bfloat16"][0]
    assert f"{folder}: not in bfloat16: in bfloat16 its weights keep" in capsys.readouterr().err
    assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16
    assert main(["merge", str(recipe.folder), "--dtype", "bfloat16"]) == 1
    said = capsys.readouterr().err
    assert "holds --dtype auto --route dequantized, and is written again as asked" in said
    assert "is not the trained model: in bfloat16 its weights keep" in said
    assert "without --dtype and --route it is written in the smallest dtype that is the trained model" in said


def test_a_dtype_whose_range_the_activations_leave_is_passed_over(runs: Path, tmp_path: Path) -> None:
    """As in Gemma 3: every weight fits into float16, and what it computes does not."""
    base = stored_in(torch.float32, runs, tmp_path, times=2**17)
    parity = parity_of(merge(trained_on(base, runs, tmp_path, "trainer.max_steps=5")))
    assert parity["problems"] == []
    assert parity["dtype"] == "float32"
    assert "not a number in float16: its activations leave the range" in " ".join(parity["refused"]["float16"])


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_an_adapter_of_an_embedding_that_the_head_shares_merges(runs: Path, tmp_path: Path, targets: list[str]) -> None:
    shutil.copytree(runs / "base" / "model", tmp_path / "tied")
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    config = read_json(tmp_path / "tied" / "config.json")
    write_json(tmp_path / "tied" / "config.json", config | {"tie_word_embeddings": True})
    wanted = [f"lora.target_modules={json.dumps(targets)}", "trainer.max_steps=5"]
    folder = merge(trained_on(tmp_path / "tied", runs, tmp_path, *wanted), MergeOptions(dtype="float32"))
    assert parity_of(folder)["problems"] == []
    assert read_json(folder / "config.json")["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("layer_replication=[[0,2],[1,2]]", "one weight in several layers, each with another adapter; use the adapter"),
        ("lora_bias=true", "peft cannot merge it: Impossible to merge LoRA with `lora_bias=True`"),
    ],
)
def test_an_adapter_that_cannot_be_part_of_the_weights_is_refused(
    runs: Path, tmp_path: Path, lora: str, message: str
) -> None:
    from sft.train.stage import train

    recipe = load(runs / "adapter.yaml", ["quantization=none", f"lora.{lora}", f"output={tmp_path / 'run'}"])
    train(recipe)
    with pytest.raises(UserError, match=re.escape(message)):
        merge(recipe)
    assert not (tmp_path / "run" / "merged").exists()


def test_a_model_that_was_trained_whole_is_copied(runs: Path) -> None:
    parity = parity_of(merge(load(runs / "base.yaml")))
    assert parity["folder"]["rounding"]["largest_logit_difference"] == 0
    assert parity["route"] is None


def test_an_adapter_that_changes_nothing_is_an_error_and_leaves_nothing(copied: Callable[[str], Recipe]) -> None:
    recipe = copied("lora")
    spoil(recipe, lambda tensors: {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()})
    with pytest.raises(UserError, match="changes no weight of its base"):
        merge(recipe)
    assert not [path for path in recipe.folder.iterdir() if "merged" in path.name]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that ends with status 2."""
    assert main(["merge", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("sft: ")]) == 1
    return lines[-1]


def test_altered_truncated_and_missing_adapters_are_told(
    copied: Callable[[str], Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copied("lora")
    file = recipe.trained / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "was altered since it was written" in refused([str(recipe.folder)], capsys)
    file.write_bytes(whole[:-1])
    assert "not of the size it was written with" in refused([str(recipe.folder)], capsys)
    shutil.rmtree(recipe.trained)
    assert "missing" in refused([str(recipe.folder)], capsys)
    (recipe.folder / "train.json").unlink()
    assert "not trained yet" in refused([str(recipe.folder)], capsys)
    assert not (recipe.folder / "merged").exists()


def test_an_adapter_of_another_base_or_shape_is_told(
    runs: Path, tmp_path: Path, copied: Callable[[str], Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copied("lora")
    shutil.copytree(runs / "base" / "model", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    changed = recipe.model_copy(update={"model": str(tmp_path / "other")})
    with pytest.raises(UserError, match="holds another run"):
        merge(changed)
    spoil(recipe, lambda tensors: {name: tensor.repeat(1, 2) for name, tensor in tensors.items()})
    assert "does not fit its base" in refused([str(recipe.folder)], capsys)


def test_a_folder_that_holds_something_else_is_left_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    (tmp_path / "file").write_text("a file")
    for place in ("thesis", "file"):
        message = refused([str(runs / "lora"), "--output", str(tmp_path / place)], capsys)
        assert "was not written by sft" in message
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


def test_options_that_mean_nothing_are_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--shard", "5"], "write a number with KB, MB, GB or TB"),
        (["--weights", "a,b"], "write a number for each run"),
        (["--weights", "nan,1"], "write a number for each run"),
        (["--weights", "0,0"], "not all of them 0"),
        (["--density", "7"], "write a share above 0 and up to 1"),
        (["--density", "half"], "write a share above 0 and up to 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["merge", str(runs / "lora"), *options])
        assert message in capsys.readouterr().err
    assert "--weights is for several runs" in refused([str(runs / "lora"), "--weights", "1"], capsys)
    several = [str(runs / "lora"), str(runs / "lora"), "--output", str(runs / "twice")]
    assert "leave it out" in refused([*several, "--density", "0.5"], capsys)


def test_the_working_folder_may_be_the_output(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(runs / "lora"), "--output", "."]) == 0
    assert (tmp_path / "config.json").is_file()


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: writing the weights fails in the same place."""
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    script += "from sft.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "merge", str(runs / "lora"), "--output", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"sft: {tmp_path / 'm'}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def second(runs: Path) -> Path:
    """Another adapter on the same base, of other rows."""
    from sft.train.stage import train

    recipe = load(
        runs / "adapter.yaml", ["quantization=none", "data.limit=50", "data.seed=7", f"output={runs / 'second'}"]
    )
    train(recipe)
    return recipe.folder


@pytest.mark.slow
def test_several_adapters_are_summed_by_their_weights(
    runs: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(runs / "lora"), str(second), "--weights", "0.7,0.3", "--output", str(tmp_path / "sum")]
    assert main(["merge", *places, "--dtype", "float32"]) == 0
    assert "its adapter alone" in capsys.readouterr().out
    assert [mixed["weight"] for mixed in parity_of(tmp_path / "sum")["mixed"]] == [0.7, 0.3]
    layer, exact = "model.layers.1.mlp.up_proj.weight", MergeOptions(dtype="float32")
    weights = {
        "sum": load_file(tmp_path / "sum" / "model.safetensors")[layer],
        "base": load_file(runs / "base" / "model" / "model.safetensors")[layer],
        "first": load_file(merge(load(runs / "lora"), exact) / "model.safetensors")[layer],
        "second": load_file(merge(load(second), exact) / "model.safetensors")[layer],
    }
    expected = 0.7 * (weights["first"] - weights["base"]) + 0.3 * (weights["second"] - weights["base"])
    torch.testing.assert_close(weights["sum"] - weights["base"], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", MIX_METHODS)
def test_each_method_gives_a_folder_that_is_its_adapter(runs: Path, second: Path, tmp_path: Path, method: str) -> None:
    recipes = [load(runs / "lora"), load(second)]
    parity = parity_of(
        merge_several(recipes, Mix((1.0, 0.5), method, 0.5 if "ties" in method else None), tmp_path / "sum")
    )
    assert parity["problems"] == []
    assert parity["mixed"][0]["alone"] < 10


def test_adapters_of_a_quantised_base_are_summed_onto_its_dequantised_weights(runs: Path, tmp_path: Path) -> None:
    recipe = load(runs / "4bit")
    parity = parity_of(merge_several([recipe, recipe], Mix((0.5, 0.5)), tmp_path / "sum"))
    assert parity["problems"] == []
    assert parity["mixed"][0]["alone"] == pytest.approx(parity["mixed"][0]["sum"], abs=0.01), "half and half is whole"


def test_adapters_that_cannot_be_summed_are_refused(
    runs: Path, second: Path, copied: Callable[[str], Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "sum")]
    assert "--output" in refused([str(runs / "lora"), str(second)], capsys)
    both = [str(runs / "lora"), str(second), *output]
    assert "1 weights for 2 runs" in refused([*both, "--weights", "1"], capsys)
    assert "needs --density" in refused([*both, "--method", "ties"], capsys)
    assert "another `quantization`" in refused([str(runs / "lora"), str(runs / "4bit"), *output], capsys)
    assert "there is no adapter" in refused([str(runs / "base"), str(second), *output], capsys)
    other = copied("lora")
    run = read_json(other.folder / "run.json")
    write_json(other.folder / "run.json", run | {"base": "0123"})
    assert "another base" in refused([str(other.folder), str(second), *output], capsys)
    run["recipe"]["lora"]["use_dora"] = True
    write_json(other.folder / "run.json", run)
    dora = ["lora.use_dora=true"]
    assert "`lora.use_dora` is set" in refused([str(other.folder), str(other.folder), *dora, *output], capsys)
    assert not (tmp_path / "sum").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_a_real_pretrained_model_goes_the_whole_way(tmp_path: Path, real_data: Path, quantization: str) -> None:
    """stories260K on real tales: train, merge, open elsewhere, ask."""
    from sft.model.artifact import open_artifact
    from sft.train.stage import train

    tales = real_data / "datasets" / "fairytale_continuation"
    overrides = [f"model={real_data / 'models' / 'stories260K'}", f"data.train={tales / 'train.jsonl'}"]
    overrides += [f"data.test={tales / 'test.jsonl'}", f"quantization={quantization}", "check.max_dropped=0.3"]
    overrides += [
        "data.limit=200",
        "trainer.max_steps=12",
        "trainer.learning_rate=5e-3",
        "trainer.per_device_train_batch_size=8",
    ]
    overrides += ["trainer.gradient_accumulation_steps=1", "trainer.eval_strategy=no", f"output={tmp_path / 'run'}"]
    recipe = load(ROOT / "recipes" / "story_gpt2_lora.yaml", overrides)
    train(recipe)
    folder = merge(recipe)
    parity = parity_of(folder)
    assert parity["problems"] == []
    assert parity["folder"]["rounding"]["mean_kl"] < 1e-5
    if quantization == "4bit":
        original = parity_of(merge(recipe, MergeOptions("original"), tmp_path / "original"))
        assert "its weights are" in original["problems"][0]
        assert original["folder"]["rounding"]["mean_kl"] > 100 * parity["folder"]["rounding"]["mean_kl"]
    found = open_artifact(folder.rename(tmp_path / "elsewhere"))
    codec = found.codec
    turns = [{"role": "user", "content": "Once upon a time, there was a fox."}]
    ids = found.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == codec.prompts(["Once upon a time, there was a fox.\n"])[0]
