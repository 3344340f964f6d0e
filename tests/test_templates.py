"""Every template trains on rows of its kind, refuses broken ones by name, and docs/templates.md works word for word."""

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from guides import Followed, follow, said

from data_templates import Row, Template
from sft.recipe import load
from sft.recipe.schema import Data, Recipe
from sft.rows.read import read
from sft.rows.template import read_prompt, read_sample, samples, template_names
from sft.tokens.codec import Codec
from sft.tokens.opened import Opened
from sft.tokens.prepare import MASKED

HERE = Path(__file__).parents[1]
RECIPES = sorted((HERE / "recipes").glob("*.yaml"))
DATA = HERE / "recipes" / "data"


def count(table: str, name: str) -> list[int]:
    """The numbers of one line of the table of `sft check`: train, test."""
    line = next(line for line in table.splitlines() if line.startswith(name))
    return [int(number.replace(",", "")) for number in line[len(name) :].split()]


# docs/templates.md, step by step


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory, gpt2_like: Path, tiny_model: Callable[..., Path]) -> Followed:
    """docs/templates.md followed to the letter in an empty folder, but for `my_model`, which is a tiny one here."""
    done = Followed(tmp_path_factory.mktemp("guide"))
    tiny_model(done.folder / "my_model", gpt2_like)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done.folder)
        return follow(HERE / "docs" / "templates.md", done)


def test_the_guide_names_every_file_and_runs_every_step(guide: Followed) -> None:
    assert len(guide.said) == 7
    files = ["quiz.jsonl", "quiz.py", "quiz.yaml", "topics.jsonl", "topics.py", "topics.yaml"]
    assert all((guide.folder / name).is_file() for name in [*files, "same_reply/same_reply.py"])
    assert (guide.folder / "runs" / "quiz" / "adapter" / "adapter_model.safetensors").is_file()
    assert (guide.folder / "runs" / "topics" / "report.html").is_file()


def test_the_guides_first_template_learns_the_reply_and_its_end_alone(guide: Followed) -> None:
    shown = guide.said["sft check quiz.yaml model=my_model --show 1"]
    assert count(shown, "rows kept") == [4, 1]
    learned = shown.replace("│", "").rsplit("⟦")[-1]
    assert learned.strip("⟧\n") == " About 27 days.<|endoftext|>"


def test_the_guides_records_become_samples_with_weights_and_stay_together_by_topic(
    guide: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(guide.folder)
    shown = guide.said["sft check topics.yaml model=my_model --show 1"]
    assert sum(count(shown, "rows kept")) == 7
    assert count(shown, "rows with loss weights") == count(shown, "rows kept")
    for seed in range(5):
        recipe = load("topics.yaml", ["model=my_model", f"data.seed={seed}"])
        tokenizer = Opened(recipe).tokenizer
        tokens = Opened(recipe).tokens
        texts = [tokenizer.decode(row["input_ids"]) for row in [*tokens.train, *tokens.test]]
        topics = [text.split("\n")[0].lower() for text in texts]
        train, test = set(topics[: len(tokens.train)]), set(topics[len(tokens.train) :])
        assert len(train) + len(test) == 4, "no topic on both sides"
        assert test


def test_the_guides_weights_reach_the_tokens(guide: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(guide.folder)
    recipe = load("topics.yaml", ["model=my_model"])
    tokenizer = Opened(recipe).tokenizer
    for row in Opened(recipe).tokens.train:
        weights = [w for w, label in zip(row["weights"], row["labels"], strict=True) if label != MASKED]
        reply, reason = max(weights), min(weights)
        assert reply == pytest.approx(3 * reason)
        assert weights == sorted(weights, reverse=True), "the reply stands before its reason"
        learned = [label for label in row["labels"] if label != MASKED]
        text = tokenizer.decode([label for label, w in zip(learned, weights, strict=True) if w == reply])
        assert text.endswith(".\n")


def test_the_guides_metric_is_scored_and_reported(guide: Followed) -> None:
    scores = json.loads((guide.folder / "runs" / "topics" / "eval" / "scores.json").read_text("utf-8"))
    assert {"base", "tuned", "difference"} <= scores["metrics"]["same_reply"].keys()
    assert "same reply" in guide.said["sft report topics.yaml model=my_model"]


# Each template trains, and is asked in use as it was asked in training


@dataclass(frozen=True)
class Source:
    """Rows that the project ships, for a template."""

    file: str
    learned: tuple[str, ...]
    """Fields that only the output is made of: at inference a row has none of them."""
    options: dict[str, Any] = field(default_factory=dict)
    template_options: dict[str, Any] = field(default_factory=dict)
    shape: Callable[[Row], Row] = dict
    """Row of the file -> row of the template, where the project ships none for it."""


def conversation(tale: Row) -> Row:
    """A tale as two questions and their answers."""
    texts = [tale["prompt"], *re.split(r"(?<=\.) ", tale["output"])[:3]]
    roles = ("user", "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}


def short(chain: Row) -> Row:
    """Two steps of a chain: with so small a vocabulary a whole one is long."""
    return {**chain, "steps": chain["steps"][:2]}


RIDDLES = {"kind": "riddle"}
SOURCES = {
    "story": Source("tales.py", ("output",), RIDDLES),
    "running_text": Source("jokes.py", ("text",)),
    "pseudocode_cot": Source("word_problems.py", ("pseudocode", "answer"), {"language": "en", "count": 24}),
    "pseudocode_cot in Chinese": Source(
        "word_problems.py", ("pseudocode", "answer"), {"language": "zh", "count": 24}, {"language": "zh"}
    ),
    "algorithm_evolution": Source("lineages.jsonl", ("next",), {}, {"innovation_weight": 2.0}, short),
    "alpaca": Source(
        "tales.py", ("output",), RIDDLES, {}, lambda tale: {"instruction": tale["prompt"], "output": tale["output"]}
    ),
    "chat": Source("tales.py", ("answer",), RIDDLES, {}, conversation),
    "sequence": Source("digits.py", ("sequence",), shape=lambda row: {"sequence": [str(n) for n in row["sequence"]]}),
}


def plain(name: str) -> Template:
    """A shipped template without options."""
    made: Template = importlib.import_module(f"data_templates.{name}").template()
    return made


@pytest.fixture
def recipe_for(tmp_path: Path, tiny_model: Callable[..., Path], write_recipe: Any) -> Callable[..., Recipe]:
    """`recipe_for(name, tokenizer)`: a recipe with a tiny model on the example and eleven shipped rows of SOURCES."""

    def make(name: str, tokenizer: Path) -> Recipe:
        template, source = name.split()[0], SOURCES[name]
        shipped = read(Data(train=str(DATA / source.file), options=source.options), "train")
        recipe = write_recipe(
            tmp_path,
            rows=[plain(template).example, *(source.shape(row) for _, row in islice(shipped, 11))],
            model=str(tiny_model(tmp_path / "model", tokenizer, max_position_embeddings=2048)),
            template=template,
            template_options=source.template_options,
            trainer={"max_length": 2048, "per_device_train_batch_size": 2},
        )
        return load(recipe)

    return make


def test_every_template_has_rows_to_try_it_on() -> None:
    assert {name.split()[0] for name in SOURCES} == set(template_names())


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["gpt2_like", "chat_like"])
@pytest.mark.parametrize("name", SOURCES)
def test_template_trains_two_steps_and_asks_in_use_what_it_asked_in_training(
    name: str, tokenizer: str, recipe_for: Callable[..., Recipe], request: pytest.FixtureRequest
) -> None:
    from sft.train.stage import train

    recipe = recipe_for(name, request.getfixturevalue(tokenizer))
    assert (train(recipe) / "adapter_model.safetensors").is_file()
    record = json.loads((recipe.folder / "train.json").read_text("utf-8"))
    assert record["steps"] == 2
    assert record["prompt_format"] == (
        "chat" if tokenizer == "chat_like" and name not in ("running_text", "sequence") else "plain"
    )

    opened = Opened(recipe)
    template, tokens, codec = opened.template, opened.tokens, opened.codec
    trained = []
    for sample in [*tokens.train, *tokens.test]:
        ids, labels = sample["input_ids"], sample["labels"]
        start = labels.count(MASKED)
        assert labels == [MASKED] * start + ids[start:]
        assert ids[-len(codec.end) :] == codec.end
        trained.append(ids[:start])
    asked: list[Row] = [
        {key: value for key, value in row.items() if key not in SOURCES[name].learned}
        for where, record in read(recipe.data, "train")
        for row in samples(template, record, where)
    ]
    assert len(trained) >= 12
    assert sorted(trained) == sorted(codec.prompts([read_prompt(template, row, "a row") for row in asked]))


def test_templates_are_listed_each_with_its_example() -> None:
    status, text = said("templates")
    assert status == 0
    entries = [entry.split("\n", 1) for entry in text.strip().split("\n\n")]
    assert [head.split(":")[0] for head, _ in entries] == template_names()
    for head, example in entries:
        template = plain(head.split(":")[0])
        assert json.loads(example) == template.example
        assert template.fields.keys() <= json.loads(example).keys()


# The pseudocode template's options, as they stand in a recipe


SHOT = {"question": "What is 2 + 2?", "pseudocode": "sum = 2 + 2\nanswer sum", "answer": "4"}
题 = {"question": "小明有3个苹果，又买了4个，共几个？", "pseudocode": "总数 = 3 + 4\n答案 总数", "answer": "7"}


def test_instruction_and_solved_examples_stand_before_each_question(
    tmp_path: Path, gpt2_like: Path, write_recipe: Any
) -> None:
    rows = [
        SHOT | {"question": f"What is {n} + 1?", "pseudocode": f"answer {n} + 1", "answer": n + 1} for n in range(8)
    ]
    recipe = load(
        write_recipe(
            tmp_path,
            rows=rows,
            model=str(gpt2_like),
            template="pseudocode_cot",
            template_options={"instruction": "Solve it step by step.", "shots": [SHOT, SHOT | {"answer": 4}]},
        )
    )
    solved = "Question: What is 2 + 2?\nSteps:\nsum = 2 + 2\nanswer sum\nAnswer: 4"
    for row in Opened(recipe).tokens.test:
        assert re.fullmatch(
            rf"Solve it step by step\.\n\n{re.escape(solved)}\n\n{re.escape(solved)}\n\n"
            r"Question: What is \d \+ 1\?\nSteps:\n",
            row["prompt"],
        )
        assert re.fullmatch(r"answer (\d) \+ 1\nAnswer: \d", row["reference"])


def test_chinese_questions_are_asked_and_answered_in_chinese(
    tmp_path: Path, gpt2_like: Path, write_recipe: Any
) -> None:
    rows = [题 | {"question": f"第{n}题：{题['question']}"} for n in range(8)]
    options = {"language": "zh", "instruction": "请一步一步地解题。", "shots": [题]}
    recipe = load(
        write_recipe(
            tmp_path, rows=rows, model=str(gpt2_like), template="pseudocode_cot", template_options=options,
            trainer={"max_length": 1024},
        )
    )  # fmt: skip
    tokenizer = Opened(recipe).tokenizer
    tokens, codec = Opened(recipe).tokens, Codec(tokenizer)
    for row in tokens.test:
        begins = f"请一步一步地解题。\n\n问题：{题['question']}\n步骤：\n{题['pseudocode']}\n答案：7\n\n问题：第"
        assert row["prompt"].startswith(begins)
        assert row["prompt"].endswith("题：小明有3个苹果，又买了4个，共几个？\n步骤：\n")
        assert row["reference"] == "总数 = 3 + 4\n答案 总数\n答案：7"
        assert codec.text([row["input_ids"][: row["prompt_tokens"]]]) == [row["prompt"]]
    assert tokens.counts["train"].changed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": [{"question": "q", "answer": "1"}]}, "`shots`: row 1 lacks `pseudocode`"),
        ({"language": "de"}, "unknown language `de`; write one of en, zh"),
        ({"shot": [SHOT]}, "unknown key `shot` under `template_options`; pseudocode_cot takes `instruction`, `shots`"),
    ],
)
def test_wrong_options_of_the_pseudocode_template_are_told(
    options: dict[str, Any], message: str, tmp_path: Path, gpt2_like: Path, write_recipe: Any
) -> None:
    changes = {"model": str(gpt2_like), "template": "pseudocode_cot", "template_options": options}
    status, text = said("check", str(write_recipe(tmp_path, rows=[SHOT] * 4, **changes)))
    assert status == 2
    assert message in text


# Broken rows


@dataclass(frozen=True)
class Broken:
    """A file with something wrong in it, below a good row, and what is said about it."""

    said: str
    content: bytes | str | list[Any]
    """A list holds rows, of which the good one is put first."""
    template: str = "story"
    file: str = "rows.jsonl"
    where: str = ":2: "
    """What stands behind the file's name."""
    settings: tuple[str, ...] = ()


ASKED, TOLD = {"role": "user", "content": "What has teeth?"}, {"role": "assistant", "content": "A comb."}
GOOD: dict[str, dict[str, Any]] = {
    "story": {"prompt": "Mira went to the well.", "output": "She found a key."},
    "running_text": {"text": "Mira went to the well."},
    "pseudocode_cot": SHOT,
    "alpaca": {"instruction": "Name an animal.", "output": "A snail."},
    "chat": {"messages": [ASKED, TOLD]},
    "sequence": {"sequence": ["C4", "E4", "G4"]},
    "algorithm_evolution": {"field": "toys", "chain": "first", "steps": [
        {"name": "A", "pseudocode": "do a"}, {"name": "B", "pseudocode": "do b"}]},
}  # fmt: skip


def story(**changes: Any) -> list[Any]:
    """A row for the story template with other values; ... takes a field away."""
    return [{key: value for key, value in (GOOD["story"] | changes).items() if value is not ...}]


def problem(**changes: Any) -> list[Any]:
    return [{key: value for key, value in (SHOT | changes).items() if value is not ...}]


def chain(*steps: Any, **changes: Any) -> list[Any]:
    """A chain called `second` with these steps behind a good one."""
    made = {"field": "toys", "chain": "second", "steps": [{"name": "C", "pseudocode": "do c"}, *steps]} | changes
    return [{key: value for key, value in made.items() if value is not ...}]


def turns(*messages: Any) -> list[Any]:
    return [{"messages": list(messages)}]


def d(**changes: Any) -> dict[str, Any]:
    """A step called D."""
    return {"name": "D", "pseudocode": "do d"} | changes


STORY = json.dumps(GOOD["story"])
NO_TEXT, EMPTY = "not text; `completion` returns text or Segments", "the output is empty, there is nothing to learn"
TEXT, COT, EVOLUTION = "running_text", "pseudocode_cot", "algorithm_evolution"

BROKEN = {
    # a field of the story
    "no prompt": Broken("no column `prompt`; there are `output`: name the right one", story(prompt=...)),
    "no output": Broken("no column `output`; there are `prompt`: name the right one", story(output=...)),
    "an empty object": Broken("no column `prompt`; there are none", [{}]),
    "prompt null": Broken("`prompt` is null; fill it in or remove the row", story(prompt=None)),
    "output null": Broken("`output` is null; fill it in or remove the row", story(output=None)),
    "output empty": Broken(EMPTY, story(output="")),
    "output blank": Broken(EMPTY, story(output=" \n\t ")),
    "output a number": Broken("`output` is a whole number, not text", story(output=5)),
    "output true": Broken("`output` is true or false, not text", story(output=True)),
    "output NaN": Broken("`output` is a number, not text", f'{STORY}\n{{"prompt": "a", "output": NaN}}\n'),
    "output a list": Broken("`output` is a list, not text", story(output=["a", "b"])),
    "output a list of parts": Broken("`output` is a list, not text", story(output=[{"type": "text", "text": "a"}])),
    "output an object": Broken("`output` is an object, not text", story(output={"text": "a"})),
    "prompt a number": Broken("`prompt` is a whole number, ", story(prompt=5)),
    "prompt a list of messages": Broken("`prompt` is a list, ", story(prompt=[{"role": "user", "content": "a"}])),
    "preference pair": Broken("a preference pair", story(chosen="a", rejected="b", output=...)),
    "half a character in the prompt": Broken("holds half a character", story(prompt="a\ud800")),
    "half a character in the output": Broken("holds half a character", story(output="\udfff")),
    "half a character deep inside": Broken("holds half a character", story(more=[{"notes": "\udc00"}])),
    "column mapped to one that is not there": Broken(
        "no column `story`, which `data.columns.output` names; there are `prompt`, `output`",
        [], where=":1: ", settings=("data.columns.output=story",),
    ),
    "a row that lacks the mapped column": Broken(
        "no column `more`, which `data.columns.output` names", f'{{"prompt": "a", "more": "b"}}\n{STORY}\n',
        settings=("data.columns.output=more",),
    ),
    "a row too long": Broken("tokens, `trainer.max_length` is 256; raise it, or write `data.overflow",
                             story(prompt="other", output="long " * 400), settings=("data.overflow=error",)),
    # a file as such
    "a list for a record": Broken("a record is an object {...}, this is ['a', 'b']", [["a", "b"]]),
    "a text for a record": Broken("a record is an object {...}, this is 'a'", ["a"]),
    "a number for a record": Broken("a record is an object {...}, this is 5", [5]),
    "null for a record": Broken("a record is an object {...}", [None]),
    "a line cut short": Broken("broken JSON at column 12: ", f'{STORY}\n{{"prompt": "a\n'),
    "single quotes": Broken("broken JSON at column 2: ", f"{STORY}\n{{'prompt': 'a', 'output': 'b'}}\n"),
    "a comma too many": Broken("broken JSON at column ", f'{STORY}\n{{"prompt": "a", "output": "b",}}\n'),
    "two records in a line": Broken("broken JSON at column ", f"{STORY}\n{STORY} {STORY}\n"),
    "brackets without end": Broken("broken JSON: nested too deeply", f"{STORY}\n{'[' * 100_000}\n"),
    "a number without end": Broken("a number of thousands of digits", f'{STORY}\n{{"prompt": {"9" * 5000}}}\n'),
    "another encoding": Broken("not utf-8; it looks like gb18030: set `data.encoding: gb18030`",
                               f'{STORY}\n{{"prompt": "从前", "output": "有座山"}}\n'.encode("gb18030")),
    "a record of a list that is none": Broken("a record is an object {...}, this is 5", f"[{STORY}, 5]",
                                              file="rows.json", where=": record 2: "),
    "one record a line in a .json": Broken("name it .jsonl", f"{STORY}\n{STORY}\n", file="rows.json"),
    "too many values": Broken("3 values for 2 columns (prompt, output)", "prompt,output\na,b,c\n", file="rows.csv"),
    "too few values": Broken("1 values for 2 columns (prompt, output)", "prompt,output\nc,d\na\n", file="rows.csv",
                             where=":3: "),
    "a quote without end": Broken("broken csv: unexpected end of data", 'prompt,output\n"a,b\nc,d\n', file="rows.csv"),
    "a column twice": Broken("two columns have the same name", "prompt,prompt\na,b\n", file="rows.csv", where=":1: "),
    "semicolons": Broken("separate columns with commas", "prompt;output\na;b\n", file="rows.csv", where=":1: "),
    "an empty cell": Broken(EMPTY, "prompt\toutput\na\t\n", file="rows.tsv"),
    "a row of Python that is a text": Broken(
        "a record is an object {...}, this is 'a'", f"def rows(split):\n    yield {STORY}\n    yield 'a'\n",
        file="rows.py", where=": row 2: ",
    ),
    "Python that fails": Broken("rows() failed: ZeroDivisionError", f"def rows(split):\n    yield {STORY}\n    1 / 0\n",
                                file="rows.py", where=":3: "),
    # running text
    "text missing": Broken("no column `text`; there are `Joke`: name the right one", [{"Joke": "a"}], TEXT),
    "text null": Broken("`text` is null", [{"text": None}], TEXT),
    "text blank": Broken(EMPTY, [{"text": "\n"}], TEXT),
    "text a number": Broken(f"the output is 1.5, {NO_TEXT}", [{"text": 1.5}], TEXT),
    "text a list": Broken("not text", [{"text": ["a"]}], TEXT),
    "a line of another encoding": Broken("not utf-8", b"one\n\xff\xfe\xfa\n", TEXT, "rows.txt"),
    # pseudocode
    "no question": Broken("no column `question`; there are `pseudocode`, `answer`", problem(question=...), COT),
    "no steps": Broken("no column `pseudocode`", problem(pseudocode=...), COT),
    "no answer": Broken("no column `answer`", problem(answer=...), COT),
    "answer null": Broken("`answer` is null", problem(answer=None), COT),
    "steps as a list": Broken("the template cannot read this row", problem(pseudocode=["a = 1"]), COT),
    # instructions and conversations
    "no instruction": Broken("no column `instruction`", [{"prompt": "a", "output": "b"}], "alpaca"),
    "instruction a list": Broken("`instruction` is a list, ", [{"instruction": ["a"], "output": "b"}], "alpaca"),
    "input a number": Broken("`input` is a whole", [{"instruction": "a", "input": 5, "output": "b"}], "alpaca"),
    "answer of parts": Broken("not text", [{"instruction": "a", "output": [{"text": "b"}]}], "alpaca"),
    "no messages": Broken("no column `messages`", [{"conversations": [ASKED, TOLD]}], "chat"),
    "messages a text": Broken("no turn of the assistant", [{"messages": "a"}], "chat"),
    "nobody answers": Broken("no turn of the assistant", turns(ASKED), "chat"),
    "nobody asks": Broken("turn 1: an answer has a turn of the user right before it", turns(TOLD), "chat"),
    "two answers in a row": Broken("turn 3: an answer has", turns(ASKED, TOLD, TOLD), "chat"),
    "a turn that is a text": Broken("turn 2 is not an object", turns(ASKED, "a"), "chat"),
    "an unknown role": Broken("turn 1 has the role 'narrator'", turns(ASKED | {"role": "narrator"}, TOLD), "chat"),
    "an empty turn": Broken("turn 2 has no text", turns(ASKED, TOLD | {"content": " "}), "chat"),
    "a picture": Broken("turn 1 is a list of parts", turns(ASKED | {"content": [{"type": "image"}]}, TOLD), "chat"),
    "a tool call": Broken("turn 2 calls a tool", turns(ASKED, TOLD | {"tool_calls": [{}]}), "chat"),
    "a preference pair of chats": Broken("a preference pair", [{"chosen": [ASKED, TOLD], "rejected": [TOLD]}], "chat"),
    # sequences
    "no sequence": Broken("no column `sequence`: name yours with data.columns", [{"tokens": ["C4"]}], "sequence"),
    "sequence null": Broken("an empty sequence; mend it or take it out", [{"sequence": None}], "sequence"),
    "sequence of nothing": Broken("an empty sequence", [{"sequence": []}], "sequence"),
    "sequence blank": Broken("an empty sequence", [{"sequence": " \n"}], "sequence"),
    "sequence a number": Broken("neither a list of ids, nor one of tokens", [{"sequence": 5}], "sequence"),
    "ids and tokens": Broken("neither a list of ids, nor one of tokens", [{"sequence": ["C4", 5]}], "sequence"),
    "ids without a vocabulary": Broken("without a vocabulary: write `tokenizer:", [{"sequence": [1]}], "sequence"),
    # chains of algorithms
    "no field": Broken("no column `field`", chain(d(), field=...), EVOLUTION),
    "field null": Broken("`field` is null", chain(d(), field=None), EVOLUTION),
    "steps missing": Broken("no column `steps`", chain(steps=...), EVOLUTION),
    "steps null": Broken("chain `second`: `steps` is not a list of steps", chain(steps=None), EVOLUTION),
    "steps a text": Broken("chain `second`: `steps` is not a list of steps", chain(steps="C, D"), EVOLUTION),
    "no steps in it": Broken("chain `second`: `steps` is not a list of steps", chain(steps=[]), EVOLUTION),
    "one step": Broken("chain `second`: has 1 step; write two or more, oldest first", chain(), EVOLUTION),
    "a step that is a name": Broken("chain `second`, step 2: is not an object", chain("D"), EVOLUTION),
    "a step without a name": Broken("chain `second`, step 2: has no `name`", chain(d(name="")), EVOLUTION),
    "a step without pseudocode": Broken("step 2: has no `pseudocode`", chain({"name": "D"}), EVOLUTION),
    "a name on two lines": Broken("step 2: `name` has more than one line", chain(d(name="D\nE")), EVOLUTION),
    "ideas that are an object": Broken("step 2: `ideas` is not text", chain(d(ideas={"a": 1})), EVOLUTION),
    "ideas that are numbers": Broken("step 2: `ideas` is not text", chain(d(ideas=[1, 2])), EVOLUTION),
    "a name twice": Broken("step 2: `c` has the name or pseudocode of step 1", chain(d(name="c")), EVOLUTION),
    "pseudocode twice": Broken("`D` has the name or pseudocode of step 1", chain(d(pseudocode="do c")), EVOLUTION),
    "a heading inside a step": Broken("`ideas` has the line `## Ideas`, which the template writes itself",
                                      chain(d(ideas="a\n## Ideas\nb")), EVOLUTION),
}  # fmt: skip


def test_at_least_forty_kinds_of_broken_rows_of_every_template_are_tried() -> None:
    assert len(BROKEN) >= 40
    assert {case.template for case in BROKEN.values()} == {name.split()[0] for name in SOURCES}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_row_ends_in_one_message_that_names_it(
    name: str, tmp_path: Path, gpt2_like: Path, write_recipe: Any
) -> None:
    case, file = BROKEN[name], tmp_path / BROKEN[name].file
    content = case.content
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in [GOOD[case.template], *content])
    recipe = write_recipe(tmp_path, model=str(gpt2_like), template=case.template, data={"train": str(file)})
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, text = said("check", str(recipe), *case.settings)
    assert status == 2, text
    note, message = text.splitlines()
    assert note.startswith("not checked against the model: "), "there is a tokenizer alone"
    assert message.startswith(f"sft: {file}{case.where}"), text
    assert case.said in message
    assert not list(tmp_path.rglob("*.part"))


# The recipes


def test_every_recipe_is_whole_and_says_how_it_is_run() -> None:
    assert len(RECIPES) >= 10
    for path in RECIPES:
        recipe, text = load(path), path.read_text("utf-8")
        header = text[: text.index("\nmodel:")]
        assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n#\n"), path
        assert re.search(r"^#   makes +\S", header, re.MULTILINE), path
        assert path.name == "quickstart.yaml" or f"#   run      ./launch.sh recipes/{path.name}" in header, path
        assert max(map(len, text.splitlines())) <= 120, path
        assert "max_new_tokens" in recipe.generation, path
        assert recipe.trainer["max_length"], path


@pytest.mark.parametrize("kind", ["story", "pseudocode", "evolution", "jokes"])
def test_each_kind_of_data_has_recipes_for_a_small_and_a_large_base(kind: str) -> None:
    recipes = [load(path) for path in RECIPES if path.name.startswith(f"{kind}_")]
    assert any(recipe.model == "gpt2" for recipe in recipes)
    large = [recipe for recipe in recipes if "-7b" in str(recipe.model).lower()]
    assert large
    assert all(recipe.quantization == "4bit" for recipe in large)


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_the_rows_that_a_recipe_names_fit_its_template(path: Path) -> None:
    recipe = load(path)
    template = Opened(recipe).template
    for side in ("train", "test"):
        records = list(islice(read(recipe.data, side), 20))
        assert len(records) == 20
        for where, record in records:
            for row in samples(template, record, where):
                read_sample(template, row, where)


def test_jokes_are_the_same_every_time_and_held_out_by_their_pun() -> None:
    data = Data(train=str(DATA / "jokes.py"), test=str(DATA / "jokes.py"))
    train, test = ([record["text"] for _, record in read(data, side)] for side in ("train", "test"))
    assert train == [record["text"] for _, record in read(data, "train")]
    assert len(set(train)) == len(train) > 2000
    assert len(set(test)) == len(test) > 200

    def puns(texts: list[str]) -> set[str]:
        found = (re.fullmatch(r"Why did the (.+)\? Because (.+)\.", text) for text in texts)
        return {match[2] for match in found if match}

    assert len(puns(train)) > 5 * len(puns(test)) > 0
    for pun in puns(test):
        assert not any(pun in text for text in train), pun
    assert not any("{" in text or "\n" in text for text in [*train, *test])


def test_a_csv_of_jokes_is_trained_on_as_the_recipe_says(
    tmp_path: Path, gpt2_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    header = (HERE / "recipes" / "jokes_gpt2_lora.yaml").read_text("utf-8")
    overrides = re.search(r"^#   (data\.train=jokes\.csv .*)$", header, re.MULTILINE)
    assert overrides
    lines = [f'{n},"Why did number {n} laugh? Because ""{n + 1}"" tickled it, twice."' for n in range(20)]
    Path("jokes.csv").write_text("\n".join(["ID,Joke", *lines]) + "\n", "utf-8")
    status, text = said(
        "check", str(HERE / "recipes" / "jokes_gpt2_lora.yaml"), f"model={gpt2_like}", *overrides[1].split()
    )
    assert status == 0, text
    assert count(text, "rows kept") == [18, 2]
    assert count(text, "seams that would have merged") == [0, 0]
