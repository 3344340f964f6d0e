"""Every format gives the same records, and a mistake in a file is told with its place and what to write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_templates import Row, Segment, Template, as_text
from sft import UserError
from sft.cli import main
from sft.recipe import load
from sft.recipe.schema import Data, Recipe
from sft.rows.read import contents, read
from sft.rows.split import Split
from sft.rows.template import keys, read_sample, samples, template_names
from sft.tokens.opened import Opened

ROWS = [
    {"prompt": "Es war einmal", "output": 'ein "König", der\nsang.'},
    {"prompt": "从前", "output": "有座山，\tcalled  hill "},
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def records(train: str, split: str = "train", **settings: Any) -> list[dict[str, Any]]:
    return [record for _, record in read(Data(train=train, **settings), split)]


def places(train: str, **settings: Any) -> list[str]:
    return [where for where, _ in read(Data(train=train, **settings), "train")]


def message(train: str, content: str | bytes | None = None, split: str = "train", **settings: Any) -> str:
    """What is said about a file with that content."""
    if content is not None:
        Path(train).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        records(train, split, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def delimited(rows: list[dict[str, str]], separator: str) -> str:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    return separator.join(rows[0]) + "\n" + "".join(separator.join(map(quoted, r.values())) + "\n" for r in rows)


def write(name: str) -> str:
    """ROWS in the format of the name."""
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), name)
    elif name in ("saved", "saved_dict"):
        from datasets import Dataset, DatasetDict

        rows = Dataset.from_list(ROWS)
        (rows if name == "saved" else DatasetDict({"train": rows, "test": rows.select([1])})).save_to_disk(name)
    elif name == "folder":
        Path("folder/inner").mkdir(parents=True)
        Path("folder/b.jsonl").write_text(jsonl(ROWS[1:]), "utf-8")
        Path("folder/a.csv").write_text(delimited(ROWS[:1], ","), "utf-8")
        Path("folder/inner/.hidden.jsonl").write_text("broken", "utf-8")
        Path("folder/notes.md").write_text("not data", "utf-8")
    else:
        text = {
            "jsonl": jsonl(ROWS),
            "json": json.dumps(ROWS, indent=1),
            "csv": delimited(ROWS, ","),
            "tsv": delimited(ROWS, "\t"),
            "py": f"def rows(split):\n    yield from {ROWS!r}\n",
        }[name.rsplit(".", 1)[1].lower()]
        Path(name).write_text(text, "utf-8")
    return name


NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.py", "a.CSV", "folder", "saved", "saved_dict"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_records(name: str) -> None:
    assert records(write(name)) == ROWS


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_renamed_in_every_format(name: str) -> None:
    found = records(write(name), columns={"prompt": "output", "output": "prompt", "more": "prompt"})
    assert [(row["prompt"], row["output"], row["more"]) for row in found] == [
        (row["output"], row["prompt"], row["prompt"]) for row in ROWS
    ]


@pytest.mark.parametrize("name", NAMES)
def test_missing_column_lists_those_there_are(name: str) -> None:
    said = message(write(name), columns={"prompt": "question"})
    assert said.endswith(" no column `question`, which `data.columns.prompt` names; there are `prompt`, `output`")
    lines = {"folder": "folder/a.csv:2: ", "a.json": "a.json: record 1: ", "a.jsonl": "a.jsonl:1: "}
    lines |= {table: f"{table}:2: " for table in ("a.csv", "a.CSV", "a.tsv")}
    assert said.startswith(lines.get(name, f"{name}: row 1: "))


@pytest.mark.parametrize("name", NAMES)
def test_limit_takes_the_first_records(name: str) -> None:
    assert records(write(name), limit=1) == ROWS[:1]


def test_held_out_rows_come_from_their_own_file_and_split() -> None:
    assert records(write("a.jsonl"), "test") == ROWS
    assert records("a.jsonl", "test", test=write("saved_dict")) == ROWS[1:]
    assert records(write("b.py").replace("b.py", "a.jsonl"), "test", test="b.py") == ROWS


def test_data_in_python_is_given_its_split_and_options() -> None:
    Path("a.py").write_text("def rows(split, times=1):\n    return [{'text': split}] * times\n")
    assert records("a.py", options={"times": 2}) == [{"text": "train"}] * 2
    assert records("a.py", "test", test="a.py", test_split="x") == [{"text": "test"}]


def test_data_in_python_may_hold_dataclasses() -> None:
    Path("a.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import asdict, dataclass\n"
        "@dataclass\nclass R:\n    text: str\ndef rows(split):\n    yield asdict(R('a'))\n"
    )
    assert records("a.py") == [{"text": "a"}]


# ---- plain text


def test_text_is_read_by_line_paragraph_or_file() -> None:
    Path("a.txt").write_text("one\n  two \n\n \nthree\nfour")
    assert records("a.txt") == [{"text": t} for t in ("one", "  two ", "three", "four")]
    assert places("a.txt") == ["a.txt:1", "a.txt:2", "a.txt:5", "a.txt:6"]
    assert records("a.txt", record="paragraph") == [{"text": "one\n  two "}, {"text": "three\nfour"}]
    assert places("a.txt", record="paragraph") == ["a.txt:1", "a.txt:5"]
    assert records("a.txt", record="file") == [{"text": "one\n  two \n\n \nthree\nfour"}]


# ---- encodings


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_mark_is_read_as_what_it_is(name: str, encoding: str) -> None:
    text = Path(write(name)).read_text("utf-8")
    Path(name).write_bytes(text.encode(encoding))
    assert records(name) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_crlf_is_read_as_it_should_be(name: str) -> None:
    Path(name).write_bytes(Path(write(name)).read_bytes().replace(b"\n", b"\r\n"))
    assert records(name) == ROWS


def test_crlf_and_byte_order_mark_leave_no_trace_in_text() -> None:
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    assert records("a.txt", record="paragraph") == [{"text": "one\ntwo"}, {"text": "three"}]


def test_line_separators_of_unicode_end_no_line() -> None:
    row = {"prompt": "a\u2028b\u0085c", "output": "d\u2029e\x1cf\x0bg"}
    Path("a.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    Path("a.txt").write_text(row["prompt"], "utf-8")
    assert records("a.jsonl") == [row]
    assert records("a.txt") == [{"text": row["prompt"]}]


TOLD = {
    "gb18030": ("从前有座山，山上有座庙，庙里有个老和尚", "gbk"),
    "big5": ("從前有座山，山上有座廟，廟裡有個老和尚在講故事", "big5"),
    "cp932": ("むかしむかしあるところに、おじいさんがいました", "shift_jis"),
    "cp949": ("옛날 옛적에 호랑이가 살았습니다", "euc_kr"),
    "cp1251": ("Жил-был старик со старухой у самого синего моря", "cp1251"),
    "cp1252": ("Le garçon déçu a mangé une crêpe à Nîmes", "latin-1"),
    "cp1250": ("Zażółć gęślą jaźń, powiedział żółw", "cp1250"),
    "utf-16-le": ("A plain story without a mark", "utf-16-le"),
    "utf-16-be": ("A plain story without a mark", "utf-16-be"),
}


@pytest.mark.parametrize("encoding", TOLD)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_file_that_is_not_utf_8_says_what_it_looks_like_and_the_key_that_reads_it(name: str, encoding: str) -> None:
    text, written_as = TOLD[encoding]
    row = {"prompt": text, "output": "x"}
    content = {"a.jsonl": jsonl([row]), "a.csv": delimited([row], ","), "a.txt": text + "\n"}[name]
    line = 2 if name == "a.csv" and "utf-16" not in encoding else 1
    said = message(name, content.encode(written_as))
    assert said == (
        f"{name}:{line}: not utf-8; it looks like {encoding}: set `data.encoding: {encoding}`, or save it as UTF-8"
    )
    assert text in records(name, encoding=encoding)[0].values(), "the advice works"


def test_line_that_is_not_utf_8_is_named_however_far_down() -> None:
    content = b'{"prompt": "a", "output": "b"}\n' * 4000 + '{"prompt": "café"}\n'.encode("latin-1")
    assert message("a.jsonl", content).startswith("a.jsonl:4001: not utf-8; it looks like cp1252")


@pytest.mark.parametrize("encoding", ["utf-9", "base64", "undefined", "a\0b", ""])
def test_unknown_encoding_is_told(encoding: str) -> None:
    said = message("a.txt", "a", encoding=encoding)
    assert said == f"`data.encoding` is {encoding!r}, which Python does not know; for instance gb18030"


# ---- broken files


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl:2: broken JSON at column 7: Expecting value; each line is"),
        ("a.jsonl", '{\n "a": 1\n}\n', "a.jsonl:1: broken JSON at column 2"),
        ("a.jsonl", '\n\n{"a": 1},\n', "a.jsonl:3: broken JSON at column 9: Extra data; each line is one whole {...}"),
        ("a.jsonl", '{"a": "\0"}\n', "a.jsonl:1: broken JSON at column 8: Invalid control character at"),
        ("a.jsonl", "[1, 2]\n", "a.jsonl:1: a record is an object {...}, this is [1, 2]"),
        ("a.jsonl", '{"a": 1}\nnull\n', "a.jsonl:2: a record is an object {...}, this is empty"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: broken JSON: nested too deeply"),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", "a.jsonl:1: broken JSON: a number of thousands of digits"),
        ("a.jsonl", '{"a": "b\\ud800"}', "a.jsonl:1: holds half a character (a lone surrogate"),
        ("a.jsonl", '{"a": [{"b": "\\udfff"}]}', "a.jsonl:1: holds half a character (a lone surrogate"),
        ("a.json", '[{"a": 1},\n{"a":\n]', "a.json:3: broken JSON at column 1: Expecting value"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "a.json:2: broken JSON at column 1: Extra data; it looks like one obj"),
        ("a.json", '{"a": 1}', "a.json: a JSON file is a list of records [{...}, ...]; this is one object"),
        ("a.json", "5", "a.json: a JSON file is a list of records [{...}, ...]"),
        ("a.json", '[{"a": 1}, 5]', "a.json: record 2: a record is an object {...}, this is 5"),
        ("a.json", "[" * 100_000, "a.json:1: broken JSON: nested too deeply"),
        ("a.csv", 'p,o\n"a\nb",c\nd,e,f\n', "a.csv:4: 3 values for 2 columns (p, o); put a value that holds"),
        ("a.csv", "p,o\na\n", "a.csv:2: 1 values for 2 columns (p, o)"),
        ("a.csv", 'p,o\na,b\nc,"d\ne,f\n', "a.csv:3: broken csv: unexpected end of data; check the quotes of this row"),
        ("a.csv", 'p,o\na,"b"x\n', "a.csv:2: broken csv: ',' expected after '\"'; check the quotes of this row"),
        ("a.csv", "p,p\na,b\n", "a.csv:1: two columns have the same name; columns are p, p"),
        ("a.csv", "p;o\na;b\n", "a.csv:1: one column, `p;o`; separate columns with commas, or with tabs in a"),
        ("a.tsv", '"Hi," she said\tb\n', "a.tsv:1: broken tsv: '\t' expected after '\"'; check the quotes of this row"),
        ("a.parquet", "not parquet", "a.parquet: not a readable Parquet file: Parquet magic bytes not found"),
        ("a.parquet", "", "a.parquet: not a readable Parquet file: Parquet file size is 0 bytes"),
        ("a.xyz", "a", "a.xyz: cannot read `.xyz` files; readable are .jsonl, .json, .csv, .tsv, .parquet, .txt, .py"),
    ],
)  # fmt: skip
def test_broken_file_names_line_and_cause(name: str, content: str, said: str) -> None:
    assert message(name, content).startswith(said)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "  \r\n"])
def test_empty_data_is_told(name: str, content: str) -> None:
    if content.strip(" ") == "\r\n" and name in ("a.csv", "a.tsv"):
        content = "prompt\n"  # to a table a blank is a value
    assert message(name, content) == f"{name}: no records in it"


def test_header_alone_and_empty_lists_are_empty_data() -> None:
    assert message("a.csv", "prompt,output\n") == "a.csv: no records in it"
    assert message("a.json", "[]") == "a.json: no records in it"
    assert message("a.py", "def rows(split):\n    return []\n") == "a.py: no records in it"


def test_blank_lines_are_no_records() -> None:
    Path("a.csv").write_text("\nprompt,output\n\na,b\n\n")
    Path("a.jsonl").write_text('\n{"a": 1}\n  \n')
    assert records("a.csv") == [{"prompt": "a", "output": "b"}]
    assert places("a.csv") == ["a.csv:4"]
    assert places("a.jsonl") == ["a.jsonl:2"]


def test_fields_of_many_megabytes_are_read() -> None:
    Path("a.csv").write_text("prompt,output\na," + "x" * 3_000_000 + "\n")
    assert len(records("a.csv")[0]["output"]) == 3_000_000


def test_damaged_parquet_is_told() -> None:
    content = Path(write("a.parquet")).read_bytes()
    assert message("a.parquet", content[:4] + b"\xff" * 12 + content[16:]).startswith("a.parquet: not a readable Parq")
    assert message("a.parquet", content[:-20]).startswith("a.parquet: not a readable Parquet file")


def test_damaged_saved_folder_is_told() -> None:
    Path(write("saved")).joinpath("dataset_info.json").unlink()
    assert message("saved").startswith("saved: not a whole folder of `save_to_disk`: ")


def test_unknown_split_lists_those_there_are() -> None:
    said = message(write("saved_dict"), train_split="dev")
    assert said == "saved_dict: no split `dev`; there are train, test: set `data.train_split`"


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv", "gone.py", "no/such/folder", "./gone", "~/gone"])
def test_missing_file_says_from_where_it_was_looked_for(name: str) -> None:
    assert message(name) == f"{name}: no such file, from {Path.cwd()}; name an existing file in `data.train`"
    said = message(write("a.jsonl"), split="test", test=name)
    assert said.endswith("name an existing file in `data.test`")


def test_link_to_itself_or_to_nothing_is_a_missing_file() -> None:
    Path("loop.jsonl").symlink_to("loop.jsonl")
    Path("gone.jsonl").symlink_to("nowhere.jsonl")
    assert message("loop.jsonl").startswith("loop.jsonl: no such file")
    assert message("gone.jsonl").startswith("gone.jsonl: no such file")


def test_folder_without_data_says_what_is_readable() -> None:
    Path("folder").mkdir()
    Path("folder/a.md").write_text("a")
    assert message("folder") == (
        "folder: no data file in this folder; readable are .jsonl, .json, .csv, .tsv, .parquet, .txt"
    )


def test_data_set_that_cannot_be_reached_says_how_to_name_a_local_one() -> None:
    said = message("someone/something")
    assert said.startswith("someone/something: is not in the hub's cache, ")
    assert said.endswith("unset it, or put its files into a folder and name that: data.train=path/to/folder")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def rows(:\n", "a.py: cannot be loaded: SyntaxError: "),
        ("x = 1\nimport no_such_thing\n", "a.py:2: cannot be loaded: ModuleNotFoundError: No module named"),
        ("import sys\nsys.exit(3)\n", "a.py:2: cannot be loaded: SystemExit: 3"),
        ("x = 1\n", "a.py: a data file in Python has a function `rows(split, **options)`"),
        ("rows = 5\n", "a.py: a data file in Python has a function `rows(split, **options)`"),
        ("def rows(split):\n    yield {}\n    raise ValueError('boom')\n", "a.py:3: rows() failed: ValueError: boom"),
        ("def rows(split):\n    return {}['x']\n", "a.py:2: rows() failed: KeyError: 'x'"),
        ("def rows(split):\n    pass\n", "a.py: rows() failed: TypeError: 'NoneType' object is not iterable"),
        ("def rows(split):\n    yield 'x'\n", "a.py: row 1: a record is an object {...}, this is 'x'"),
        ("def rows(split):\n    yield {'a': '\\ud800'}\n", "a.py: row 1: holds half a character"),
    ],
)
def test_mistake_in_python_names_file_and_line(code: str, said: str) -> None:
    assert message("a.py", code).startswith(said)


def test_option_that_rows_does_not_take_is_told() -> None:
    said = message("a.py", "def rows(split, times=1):\n    yield {}\n", options={"tiems": 2})
    assert said.startswith("a.py: rows(split, times=1) does not take `data.options` {'tiems': 2}: ")


# ---- contents


def test_contents_change_with_content_alone() -> None:
    first = contents(Data(train=write("a.jsonl")), "train")
    Path("a.jsonl").touch()
    assert contents(Data(train="a.jsonl"), "train") == first
    assert first.keys() == {"a.jsonl"}
    Path("a.jsonl").write_text(jsonl(ROWS).replace("König", "Kaiser"), "utf-8")
    assert contents(Data(train="a.jsonl"), "train") != first


def test_contents_of_python_follow_the_files_that_it_reads() -> None:
    Path("a.py").write_text("def rows(split):\n    yield {'text': open('words.txt').read()}\n")
    Path("words.txt").write_text("one")
    first = contents(Data(train="a.py"), "train")
    Path("words.txt").write_text("two")
    assert contents(Data(train="a.py"), "train") != first


# ---- rows through a template


def template(code: str | None = None, name: str = "my.py", **options: Any) -> Template:
    if code is not None:
        Path(name).write_text(code)
    recipe = Recipe(model="m", template=name, template_options=options, data=Data(train="a.jsonl"))
    return Opened(recipe).template


STORY = Template(
    fields={"prompt": "", "output": ""}, prompt=lambda row: row["prompt"] + "\n", completion=lambda row: row["output"]
)


@pytest.mark.parametrize("name", template_names())
def test_every_template_reads_its_own_example(name: str) -> None:
    found = template(name=name)
    rows = samples(found, found.example, "example")
    assert rows
    for row in rows:
        prompt, output = read_sample(found, row, "example")
        assert isinstance(as_text(prompt), str)
        assert any(segment.text.strip() for segment in output)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "f:1: no column `output`; there are `prompt`: name the right one in the recipe"),
        ({}, "f:1: no column `prompt`; there are none"),
        ({"prompt": "a", "output": None}, "f:1: `output` is null; fill it in or remove the row"),
        ({"prompt": "a", "output": ""}, "f:1: the output is empty, there is nothing to learn; fill it in or remove"),
        ({"prompt": "a", "output": " \n"}, "f:1: the output is empty, there is nothing to learn"),
        ({"prompt": "a", "output": 5}, "f:1: the output is 5, not text"),
        ({"prompt": "a", "output": ["b"]}, "f:1: the output is ['b'], not text"),
        ({"prompt": 5, "output": "b"}, "f:1: the template cannot read this row: `prompt` is a whole number, not text"),
    ],
)
def test_row_that_does_not_fit_its_template_is_told(row: Row, said: str) -> None:
    with pytest.raises(UserError) as error:
        read_sample(STORY, row, "f:1")
    assert str(error.value).startswith(said)


def test_output_of_masked_segments_alone_is_empty() -> None:
    masked = Template(fields={}, prompt=lambda row: "", completion=lambda row: [Segment("a", "text", weight=0.0)])
    with pytest.raises(UserError, match="f:1: the output is empty"):
        read_sample(masked, {}, "f:1")


@pytest.mark.parametrize("function", [samples, keys])
def test_exception_in_a_lazy_template_names_the_row(function: Callable[..., Any]) -> None:
    def lazy(row: Row) -> Any:
        yield row["steps"][0]

    both = Template(fields={}, prompt=str, completion=str, samples=lazy, keys=lazy)
    with pytest.raises(UserError, match=r"f:1: no column `steps`; there are `a`"):
        function(both, {"a": 1}, "f:1")
    with pytest.raises(UserError, match=r"f:1: the template cannot read this row: IndexError"):
        function(both, {"steps": []}, "f:1")


BODY = "from data_templates import Template\ndef template({}):\n    {}\n"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def template(:\n", r"my\.py: cannot be loaded: SyntaxError"),
        ("1 / 0\n", r"my\.py:1: cannot be loaded: ZeroDivisionError"),
        ("x = 1\n", r"my\.py: a template file has a function `template\(\.\.\.\)` that returns a Template"),
        ("template = 5\n", r"my\.py: a template file has a function `template\(\.\.\.\)`"),
        (BODY.format("", "return 5"), r"my\.py: `template\(\)` returns a int, not a data_templates\.Template"),
        (BODY.format("", "return {}['a']"), r"my\.py: template\(\) failed: KeyError: 'a'"),
        (BODY.format("must", "return 5"), r"my\.py: `template_options`: .*missing 1 required .* 'must'"),
    ],
)
def test_mistake_in_a_template_file_is_told(code: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        template(code)


def test_unknown_template_and_option_are_told() -> None:
    with pytest.raises(UserError, match=r"unknown template `stroy`; did you mean `story`\? Your own is named by its"):
        template(name="stroy")
    with pytest.raises(UserError, match=r"unknown template `zzz`; there are .*story.*\. Your own is named by its path"):
        template(name="zzz")
    with pytest.raises(UserError, match=r"gone\.py: no such template file"):
        template(name="gone.py")
    with pytest.raises(UserError, match="unknown key `seperator` under `template_options`; story takes `separator`"):
        template(name="story", seperator="x")
    with pytest.raises(UserError, match="unknown language `fr`"):
        template(name="pseudocode_cot", language="fr")


# ---- what would come in unseen


def noticed(train: str, template: str = "story", split: str = "train", **settings: Any) -> dict[str, tuple[int, str]]:
    """What is noticed -> in how many records or files, and the first."""
    data = Data(train=train, **settings)
    some = Split(data, Opened(Recipe(model="m", template=template, data=data)).template)
    list(some.samples())
    return {note.what: (note.number, note.first) for note in some.notes.all()}


def unread(column: str) -> str:
    return f"records with `{column}`, which the template does not read"


def test_columns_that_the_template_does_not_read_are_named_with_the_records_that_fill_them() -> None:
    dolly = [{"instruction": f"Say {i}.", "response": "No.", "context": "" if i < 2 else "It is."} for i in range(5)]
    Path("dolly.jsonl").write_text(jsonl(dolly))
    columns = {"output": "response"}
    assert noticed("dolly.jsonl", "alpaca", columns=columns) == {unread("context"): (3, "dolly.jsonl:3")}
    alpaca = [
        {"instruction": "a", "input": "b", "output": "c", "system": "Be brief.", "history": h} for h in ([], ["d"])
    ]
    Path("alpaca.jsonl").write_text(jsonl(alpaca))
    assert noticed("alpaca.jsonl", "alpaca") == {
        unread("system"): (2, "alpaca.jsonl:1"),
        unread("history"): (1, "alpaca.jsonl:2"),
    }


def test_a_column_that_is_read_by_its_name_or_with_the_whole_record_is_read() -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("chat.jsonl").write_text(jsonl([{"talk": asked, "system": "c", "id": 0}]))
    assert noticed("chat.jsonl", "chat", columns={"messages": "talk"}) == {unread("id"): (1, "chat.jsonl:1")}
    Path("own.py").write_text(
        "from data_templates import Template\n"
        "def template():\n"
        "    return Template(fields={}, prompt=lambda row: str({**row}), completion=lambda row: row['output'])\n"
    )
    assert noticed(write("a.jsonl"), "own.py") == {}


def test_files_of_a_folder_that_are_not_read_are_named() -> None:
    write("folder")
    Path("folder/b.jsonl.gz").write_bytes(b"\x1f\x8b")
    assert noticed("folder") == {"files of the folder that are not read": (2, "folder/b.jsonl.gz")}


@pytest.mark.parametrize("name", ["test.jsonl", "validation-00000-of-00001.jsonl", "my_Test.csv", "dev/rows.jsonl"])
def test_rows_for_testing_that_a_folder_gives_to_training_are_named(name: str) -> None:
    file = Path("data") / name
    file.parent.mkdir(parents=True)
    file.write_text(jsonl(ROWS) if name.endswith("jsonl") else delimited(ROWS, ","))
    for other in ("train.jsonl", "contest.jsonl", "latest.jsonl"):
        Path("data", other).write_text(jsonl(ROWS))
    what = "files that are read as training rows, though their names say that they are for testing"
    assert noticed("data") == {what: (1, str(file))}
    assert noticed("data/train.jsonl", test=str(file)) == {}, "a file that is named is meant"


FINE = '{"prompt": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("file", "content", "first"),
    [
        ("a.jsonl", FINE + '\n{"prompt": "c", "output": "d", "output": "e"}\n', "a.jsonl:2: `output`"),
        ("a.jsonl", '{"prompt": "a", "output": "b", "more": [{"x": 1, "x": 2}]}\n' + FINE, "a.jsonl:1: `x`"),
        ("a.json", f"[{FINE}, " + '{"prompt": "c", "prompt": "d", "output": "e"}]', "a.json: `prompt`"),
    ],
)  # fmt: skip
def test_a_key_that_stands_twice_is_named(file: str, content: str, first: str) -> None:
    Path(file).write_text(content)
    twice = "records of JSON with a key that stands twice in an object, of which the last counts"
    assert noticed(file)[twice] == (1, first)


def test_a_parquet_file_with_a_column_twice_is_refused_as_a_csv_is() -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["prompt", "output", "output"])
    pyarrow.parquet.write_table(table, "a.parquet")
    assert message("a.parquet") == "a.parquet: two columns have the same name; columns are prompt, output, output"


def test_records_that_say_they_are_bad_are_named_unless_the_template_reads_it() -> None:
    Path("kto.jsonl").write_text(jsonl([{"prompt": str(i), "output": "b", "label": i % 2 == 0} for i in range(4)]))
    bad = "records that say of themselves that they are bad, in a column that the template does not read: `label`"
    assert noticed("kto.jsonl") == {unread("label"): (4, "kto.jsonl:1"), bad: (2, "kto.jsonl:2")}
    Path("own.py").write_text(
        "from data_templates import Template\n"
        "def template():\n"
        "    return Template(fields={}, prompt=lambda row: row['prompt'], completion=lambda row: row['output'],\n"
        "                    samples=lambda row: [row] if row['label'] else [])\n"
    )
    assert noticed("kto.jsonl", "own.py") == {}


def test_check_prints_what_was_noticed(gpt2_like: Path, write_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": str(i), "output": f"b{i}", "source": "web"} for i in range(8)]
    file = write_recipe(Path.cwd(), rows, model=str(gpt2_like))
    assert main(["check", str(file)]) == 0
    line = f"8 {unread('source')}; the first: {file.with_name('rows.jsonl')}:1"
    assert line in capsys.readouterr().out
    assert main(["check", str(file), "--json"]) == 0, "it is kept with the tokens"
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert (note["what"], note["number"]) == (unread("source"), 8)


def test_the_class_of_a_row_is_a_column_that_the_template_reads(gpt2_like: Path, write_recipe: Any) -> None:
    rows = [{"sequence": f"a b c{i}", "label": i % 2, "id": i} for i in range(8)]
    for template, columns in (("sequence", ["id"]), ("running_text", ["label", "id"])):
        data = {"columns": {"text": "sequence"}} if template == "running_text" else {}
        file = write_recipe(Path.cwd(), rows, model=str(gpt2_like), template=template, data=data)
        assert [note.what for note in Opened(load(file)).tokens.notes] == [unread(column) for column in columns]


# ---- rows that cannot be used


def all_of(template: str, rows: list[dict[str, Any]]) -> list[str]:
    """What is said about these rows, in lines."""
    Path("rows.jsonl").write_text(jsonl(rows))
    with pytest.raises(UserError) as error:
        noticed("rows.jsonl", template)
    return str(error.value).splitlines()


QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_all_conversations_that_cannot_be_used_are_reported_at_once_by_kind() -> None:
    fine = {"messages": [QUESTION, ANSWER]}
    rows = [
        fine,
        {"messages": [QUESTION]},
        {"messages": [QUESTION, ANSWER, ANSWER]},
        fine,
        {"messages": [ANSWER]},
        {"messages": 5},
    ]
    bad = "where the template cannot read this row: ValueError"
    assert all_of("chat", [*rows, {"talk": []}]) == [
        "rows.jsonl: 5 of 7 records cannot be used; mend them or take them out",
        f"  1 {bad}: no turn of the assistant, so there is nothing to learn: rows.jsonl:2",
        f"  2 {bad}: turn 3: an answer has a turn of the user right before it: rows.jsonl:3, rows.jsonl:5",
        f"  1 {bad}: `messages` is not a list of turns: rows.jsonl:6",
        "  1 where no column `messages`; there are `talk`: name the right one in the recipe, "
        "`data: {columns: {messages: ...}}`: rows.jsonl:7",
    ]


def test_wrong_types_are_reported_in_words_by_column() -> None:
    rows: list[dict[str, Any]] = [{"instruction": str(i), "output": "b", "id": i} for i in range(20)]
    for i, wrong in ((3, {"input": 5}), (5, {"input": {"x": 1}}), (7, {"instruction": ["a"]}), (8, {"output": None})):
        rows[i] |= wrong
    for i in range(9, 20):
        rows[i]["input"] = i
    numbers = ", ".join(f"rows.jsonl:{i}" for i in (4, *range(10, 19)))
    bad = "where the template cannot read this row"
    assert all_of("alpaca", rows) == [
        "rows.jsonl: 15 of 20 records cannot be used; mend them or take them out",
        f"  12 {bad}: `input` is a whole number, not text: {numbers} and 2 more",
        f"  1 {bad}: `input` is an object, not text: rows.jsonl:6",
        f"  1 {bad}: `instruction` is a list, not text: rows.jsonl:8",
        "  1 where `output` is null; fill it in or remove the row: rows.jsonl:9",
    ]


def test_chains_are_of_one_kind_whatever_they_are_called() -> None:
    chains = [{"field": "f", "chain": name, "steps": [{"name": "a", "pseudocode": "b"}]} for name in ("one", "two")]
    assert all_of("algorithm_evolution", chains)[1:] == [
        "  2 where the template cannot read this row: ValueError: chain `one`: has 1 step; write two or more, oldest "
        "first: rows.jsonl:1, rows.jsonl:2"
    ]


def test_a_file_of_which_no_row_fits_is_not_read_to_its_end() -> None:
    found = all_of("story", [{"question": "a", "answer": "b"}] * 1500)
    assert found[0] == "rows.jsonl: 1,000 of 1,000 records cannot be used; mend them or take them out"
    late = [{"prompt": "a", "output": "b"}, *[{"question": "a", "answer": "b"}] * 1500]
    assert all_of("story", late)[0].startswith("rows.jsonl: 1,500 of 1,501 records")
