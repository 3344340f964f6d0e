"""The hub: what it refuses is said with what to do, the same by every command; a revision is kept and given on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROWS
from hub_server import Hub, Repository, sha

from sft import UserError
from sft.files import read_json
from sft.hub import place
from sft.recipe import load

RUNNER = """
import json, os, sys, traceback
import peft, sft.train, sft.memory.fit, datasets  # once, for the seconds that it takes
from sft.cli import main
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

for place, arguments in enumerate(json.loads(sys.argv[1])):
    if not (case := os.fork()):
        for stream in (1, 2):
            os.dup2(os.open(f"{place}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        status = 1
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(case, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """What became of a command."""

    status: int
    stdout: str
    stderr: str


def run(folder: Path, environment: dict[str, str], *commands: list[str]) -> list[Ended]:
    """Run commands one after the other, each in a process of its own."""
    runner = subprocess.run([sys.executable, "-c", RUNNER, json.dumps(commands)], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, text=True, check=True, timeout=500)  # fmt: skip
    return [
        Ended(int(status), *((folder / f"{i}.{stream}").read_text("utf-8") for stream in (1, 2)))
        for i, status in enumerate(runner.stdout.split())
    ]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, gpt2_like: Path, tiny_model: Callable[..., Path]) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    main = tiny_model(folder / "main", gpt2_like, "llama")
    first = tiny_model(folder / "first", gpt2_like, "llama", initializer_range=0.1)
    pickles = shutil.copytree(main, folder / "pickles")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    ggufs = folder / "ggufs"
    ggufs.mkdir()
    (ggufs / "model.gguf").write_bytes(b"GGUF")
    for name, rows in (("rows", ROWS), ("rows-v1", ROWS[:16])):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with Hub({
        "org/model": Repository(main, {"v1": first, "v1.1": first}),
        "org/gated": Repository(main, gated=True),
        "google/gemma-2b": Repository(main, gated=True),
        "org/pickles": Repository(pickles),
        "org/ggufs": Repository(ggufs),
        "org/rows": Repository(folder / "rows", {"v1": folder / "rows-v1"}, dataset=True),
        "org/secrets": Repository(folder / "rows", gated=True, dataset=True),
    }) as hub:  # fmt: skip
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_recipe: Any) -> Path:
    """A folder with a recipe whose model is on the hub."""
    folder: Path = tmp_path_factory.mktemp("work")
    write_recipe(folder, model="org/model")
    return folder


REFUSED = {
    "gated": ("model=org/gated", "org/gated: is gated: open URL/org/gated and accept its licence, "),
    "missing": ("model=mistralai/Mistral-7B", "no such model on URL, nor such a folder here; did you mean mistralai/"),
    "missing, like nothing": ("model=nobody/qqqqqqqq", "on URL, nor such a folder here; check its spelling"),
    "revision": ("model=org/model@v2", "has no revision `v2`; there are branches main and tags v1, v1.1, and hashes"),
    "revision in its own key": ("trainer.model_init_kwargs={revision: v3}", "has no revision `v3`; there are branches"),
    "pickles": ("model=org/pickles", "org/pickles: has no safetensors, and a pickle is not loaded"),
}  # fmt: skip
EVERYWHERE = ("check", "fit", "train")
OF_DATA = {
    "gated": ("data.train=org/secrets", "org/secrets: is gated: open URL/datasets/org/secrets and accept its licence"),
    "missing": ("data.train=org/row", "org/row: there is no such data set on URL, nor is there such a file or folder"),
    "revision": ("data.train=org/rows@v2", "org/rows: has no revision `v2`; there are branches main and tags v1, and"),
    "test side": ("data.test=org/secrets", "org/secrets: is gated"),
    "a model": ("data.train=https://huggingface.co/org/model", "data.train` is a data set; model=org/model names it"),
}  # fmt: skip
NOT_A_MODEL = {
    "ggufs": ("model=org/ggufs", "org/ggufs: holds GGUF files, which are not trained; name the model that they were"),
}


@pytest.fixture(scope="module")
def refused(hub: Hub, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ended]:
    """What each command says of each of the above."""
    jobs = {
        (name, command): [command, "recipe.yaml", setting]
        for name, (setting, _) in REFUSED.items()
        for command in EVERYWHERE
    }
    jobs |= {
        (f"data: {name}", c): [c, "recipe.yaml", s] for name, (s, _) in OF_DATA.items() for c in ("check", "train")
    }
    jobs |= {(name, "check"): ["check", "recipe.yaml", setting] for name, (setting, _) in NOT_A_MODEL.items()}
    jobs["known", "fit"] = ["fit", "recipe.yaml", "model=google/gemma-2b"]
    jobs["no file", "check"] = ["check", "recipe.yaml", "model=org/gated", "data.train=gone.jsonl"]
    ended = run(folder, hub.environment(tmp_path_factory.mktemp("cache")), *jobs.values())
    return dict(zip(jobs, ended, strict=True))


def is_said(ended: Ended, words: str, hub: Hub) -> None:
    """One sentence, exit status 2, no traceback."""
    assert ended.status == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    message = ended.stderr[ended.stderr.index("sft: ") :]
    assert words.replace("URL", hub.url) in message
    assert len(message.splitlines()) == 1, message


@pytest.mark.slow
@pytest.mark.parametrize("command", EVERYWHERE)
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_refuses_is_said_alike_by_every_command(
    refused: dict[tuple[str, str], Ended], hub: Hub, name: str, command: str
) -> None:
    is_said(refused[name, command], REFUSED[name][1], hub)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize("name", OF_DATA)
def test_data_sets_are_refused_with_the_same_advice(
    refused: dict[tuple[str, str], Ended], hub: Hub, name: str, command: str
) -> None:
    is_said(refused[f"data: {name}", command], OF_DATA[name][1], hub)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_A_MODEL)
def test_a_repository_without_a_whole_model_is_named(
    refused: dict[tuple[str, str], Ended], hub: Hub, name: str
) -> None:
    is_said(refused[name, "check"], NOT_A_MODEL[name][1], hub)


@pytest.mark.slow
def test_what_a_gated_model_takes_is_known_without_its_licence(refused: dict[tuple[str, str], Ended], hub: Hub) -> None:
    ended = refused["known", "fit"]
    assert ended.status in (0, 1)  # whether a card has enough
    assert f"google/gemma-2b: is gated: open {hub.url}/google/gemma-2b" in ended.stderr
    assert "config from sft/memory/models" in ended.stderr


@pytest.mark.slow
def test_a_missing_data_file_is_reported_before_anything_is_fetched(
    refused: dict[tuple[str, str], Ended], hub: Hub
) -> None:
    is_said(refused["no file", "check"], "gone.jsonl: no such file, from ", hub)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer; check the network, set"),
        ({"HF_HUB_OFFLINE": "1"}, "the hub is not asked, as HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it"),
    ],
)  # fmt: skip
def test_a_hub_that_cannot_be_asked_is_said_alike(
    folder: Path, hub: Hub, tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    commands = [[command, "recipe.yaml"] for command in EVERYWHERE]
    commands += [["check", "recipe.yaml", "data.train=org/rows", f"model={folder_of(hub, 'org/model')}"]]
    for ended in run(folder, hub.environment(tmp_path) | environment, *commands):
        is_said(ended, said, hub)


def folder_of(hub: Hub, name: str) -> Path:
    return hub.repositories[name].main


@pytest.mark.parametrize(
    ("text", "kind", "name", "revision"),
    [
        ("org/name", "model", "org/name", None),
        ("org/name@v1", "model", "org/name", "v1"),
        ("gpt2@refs/pr/3", "model", "gpt2", "refs/pr/3"),
        ("https://huggingface.co/org/name", "model", "org/name", None),
        ("https://huggingface.co/org/name/", "model", "org/name", None),
        ("https://huggingface.co/org/name?library=transformers#use", "model", "org/name", None),
        ("http://hf.co/org/name/tree/v1", "model", "org/name", "v1"),
        ("huggingface.co/org/name/tree/refs%2Fpr%2F3", "model", "org/name", "refs/pr/3"),
        ("https://huggingface.co/gpt2", "model", "gpt2", None),
        ("hf://org/name@v1", "model", "org/name", "v1"),
        ("https://huggingface.co/datasets/org/name", "dataset", "org/name", None),
        ("https://huggingface.co/datasets/org/name/tree/v1", "dataset", "org/name", "v1"),
        ("https://huggingface.co/datasets/org/name/viewer/default/train", "dataset", "org/name", None),
        ("hf://datasets/org/name@v1", "dataset", "org/name", "v1"),
    ],
)  # fmt: skip
def test_a_revision_and_an_address_are_understood(text: str, kind: Any, name: str, revision: str | None) -> None:
    assert place(text, kind) == (name, revision)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("https://huggingface.co/datasets/org/name", "model", "the page of a data set, and `model` is a model; data."),
        ("https://huggingface.co/org/name", "dataset", "the page of a model, and `data.train` is a data set; model="),
        ("https://huggingface.co/spaces/org/name", "model", "is not the page of a model; write model=ORG/NAME"),
        ("https://huggingface.co/org/name/blob/main/config.json", "model", "address of one file; write model=org/name"),
        ("https://huggingface.co/datasets/o/n/resolve/main/a.csv", "dataset", "data.train=o/n, or download it and"),
        ("https://example.com/rows.jsonl", "dataset", "is not an address of the hub; download it and name the file"),
        ("https://github.com/org/name", "model", "is not an address of the hub; write model=ORG/NAME"),
        ("https://huggingface.co/", "model", "names no repository; write model=ORG/NAME"),
    ],
)  # fmt: skip
def test_an_address_of_something_else_says_what_to_write(text: str, kind: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        place(text, kind)
    assert said in str(error.value)


def test_a_recipe_keeps_the_id_and_the_revision_apart(tmp_path: Path, write_recipe: Any) -> None:
    recipe = load(write_recipe(tmp_path, model="https://huggingface.co/org/name/tree/v1"))
    assert recipe.model == "org/name"
    assert recipe.trainer["model_init_kwargs"] == {"revision": "v1"}
    assert load(write_recipe(tmp_path, model="org/name@v1")) == recipe
    with pytest.raises(UserError, match=r"recipe.yaml:1: `model` names the revision v1, and .* is v2; write one"):
        load(tmp_path / "recipe.yaml", ["trainer.model_init_kwargs.revision=v2"])
    (tmp_path / "a@b").mkdir()
    assert load(tmp_path / "recipe.yaml", [f"model={tmp_path}/a@b"]).model == f"{tmp_path}/a@b"  # a folder is a folder


@pytest.fixture(scope="module")
def pinned(hub: Hub, tmp_path_factory: pytest.TempPathFactory, write_recipe: Any) -> tuple[Path, Path]:
    """A run on the tag `v1`, exported as an adapter after `main` was fetched as well; and the hub's cache."""
    folder, cache = tmp_path_factory.mktemp("pinned"), tmp_path_factory.mktemp("cache")
    write_recipe(folder, model="org/model@v1")
    commands = [["check", "recipe.yaml"], ["train", "recipe.yaml"], ["export", "runs/run", "--to", "adapter"]]
    shutil.copyfile(folder / "recipe.yaml", folder / "main.yaml")
    latest = ["train", "main.yaml", "model=org/model", "output=runs/latest"]
    for ended in run(folder, hub.environment(cache), latest, *commands):
        assert ended.status == 0, ended.stderr
    return folder / "runs" / "run", cache


@pytest.mark.slow
def test_the_commit_of_the_base_is_kept_and_goes_along_with_the_adapter(hub: Hub, pinned: tuple[Path, Path]) -> None:
    commit = sha(hub.repositories["org/model"].tags["v1"])
    base = read_json(pinned[0] / "train.json")["base"]
    assert base == {"model": "org/model", "revision": "v1", "commit": commit}
    exported = pinned[0] / "export" / "adapter"
    settings = read_json(exported / "adapter_config.json")
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/model", commit)
    assert f'from_pretrained("org/model", revision="{commit}")' in (exported / "README.md").read_text("utf-8")
    assert read_json(exported / "parity.json")["by_card"]["relative_difference"] < 1e-5


@pytest.mark.slow
def test_a_card_whose_code_opens_another_commit_is_found_out(hub: Hub, pinned: tuple[Path, Path]) -> None:
    code = """
import sys, sft.export.adapter as target
right = target.how_to_load
target.how_to_load = lambda *given: right(*given).replace(", revision=", ", variant=None) # ")
from sft.cli import main
sys.exit(main(["export", sys.argv[1], "--to", "adapter"]))
"""
    folder, cache = pinned
    shutil.rmtree(folder / "export")
    wrong = subprocess.run([sys.executable, "-c", code, str(folder)], env=hub.environment(cache, HF_HUB_OFFLINE="1"),
                           capture_output=True, text=True)  # fmt: skip
    assert wrong.returncode == 1, wrong.stderr
    assert "README.md's code: difference of logits over their spread is" in wrong.stderr


@pytest.mark.slow
def test_a_run_keeps_to_its_commit_after_main_has_moved_on(hub: Hub, tmp_path: Path, write_recipe: Any) -> None:
    write_recipe(tmp_path, model="org/model")
    environment = hub.environment(tmp_path / "cache")
    assert run(tmp_path, environment, ["train", "recipe.yaml"])[0].status == 0
    repository = hub.repositories["org/model"]
    before, moved = repository.main, repository.tags["v1"]
    hub.repositories["org/model"] = Repository(moved, {"old": before, "v1": moved})
    try:
        fetched = ["check", "recipe.yaml", "output=runs/other"]
        ended = run(tmp_path, environment, fetched, ["export", "runs/run", "--to", "adapter"])
    finally:
        hub.repositories["org/model"] = repository
    assert [one.status for one in ended] == [0, 0], ended[1].stderr
    assert sha(before) in (tmp_path / "runs" / "run" / "export" / "adapter" / "README.md").read_text("utf-8")


def test_the_card_of_a_run_is_its_own(tuned: Any) -> None:
    text = (tuned.trained / "README.md").read_text("utf-8")
    assert "18 rows" in text
    assert "More Information Needed" not in text
    assert "--to adapter" in text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "files", "said"), [
    ("org/model", "*.json", "org/model: is not in the hub's cache, "),
    ("org/pickles", "*", "org/pickles: has no safetensors, and a pickle is not loaded"),
])  # fmt: skip
def test_weights_that_were_not_fetched_are_not_taken_for_pickles(
    hub: Hub, folder: Path, tmp_path: Path, name: str, files: str, said: str
) -> None:
    fetch = "import sys; from huggingface_hub import snapshot_download as f; f(sys.argv[1], allow_patterns=sys.argv[2])"
    subprocess.run([sys.executable, "-c", fetch, name, files], env=hub.environment(tmp_path), check=True)
    offline = hub.environment(tmp_path, HF_HUB_OFFLINE="1")
    is_said(run(folder, offline, ["train", "recipe.yaml", f"model={name}", "output=runs/offline"])[0], said, hub)


@pytest.mark.slow
def test_a_token_that_is_refused_is_not_a_missing_model(hub: Hub, folder: Path, tmp_path: Path) -> None:
    commands = [[command, "recipe.yaml"] for command in EVERYWHERE] + [["check", "recipe.yaml", "data.train=org/rows"]]
    for ended in run(folder, hub.environment(tmp_path, HF_TOKEN="wrong"), *commands):
        is_said(ended, "the hub refuses your token (401); run `hf auth login` again, or set HF_TOKEN to another", hub)


@pytest.mark.slow
def test_a_revision_of_a_data_set_is_the_one_that_is_read(hub: Hub, folder: Path, tmp_path: Path) -> None:
    named = ["org/rows", "org/rows@v1", "https://huggingface.co/datasets/org/rows/tree/v1"]
    model = f"model={folder_of(hub, 'org/model')}"
    commands = [["check", "recipe.yaml", model, f"data.train={name}", "--json"] for name in named]
    ended = run(folder, hub.environment(tmp_path), *commands)
    assert [one.status for one in ended] == [0, 0, 0], ended[1].stderr
    rows = [sum(json.loads(one.stdout)[side]["rows"] for side in ("train", "test")) for one in ended]
    assert rows == [len(ROWS), 16, 16]


@pytest.mark.slow
def test_a_tokenizer_of_its_own_may_name_a_revision(hub: Hub, folder: Path, tmp_path: Path) -> None:
    tokenizers = ["tokenizer=org/model@v1", "tokenizer=org/model@v2", "tokenizer=org/gated"]
    model = f"model={folder_of(hub, 'org/model')}"
    first, second, third = run(
        folder, hub.environment(tmp_path), *(["check", "recipe.yaml", model, t] for t in tokenizers)
    )
    assert first.status == 0, first.stderr
    is_said(second, "org/model: has no revision `v2`; there are branches main and tags v1", hub)
    is_said(third, "org/gated: is gated: open URL/org/gated", hub)
