"""Files to records: every format that a recipe may name, read one record at a time, with the place of each."""

import csv
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sft import UserError
from sft.recipe import Data

Record = tuple[str, dict[str, Any]]
"""Where a record stands (`stories.jsonl:17`), and the record."""


def read(data: Data, split: str) -> Iterator[Record]:
    """Records of `data.train` or `data.test`, columns renamed to the template's fields.

    Raises UserError that names file and line for a file that is missing, empty, broken or not in its encoding.
    """
    source = data.train if split == "train" or data.test is None else data.test
    count = 0
    for where, record in _read_source(source, data, split):
        for field, column in data.columns.items():
            if column not in record:
                raise UserError(
                    f"{where}: no column `{column}`, which `data.columns.{field}` names; there are {_names(record)}"
                )
        yield where, record | {field: record[column] for field, column in data.columns.items()}
        count += 1
        if count == data.limit:
            return
    if not count:
        raise UserError(f"{source}: no records in it")


def fingerprint(data: Data, split: str) -> str:
    """Hash of the content that `read` would read, and of the settings that decide how."""
    source = Path(data.train if split == "train" or data.test is None else data.test)
    digest = hashlib.sha256(
        repr(
            (
                split,
                data.columns,
                data.record,
                data.encoding,
                data.options,
                data.subset,
                data.train_split,
                data.test_split,
                data.limit,
                source.name,
            )
        ).encode()
    )
    for file in _files(source) if source.exists() else ():
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def load_python(path: Path) -> ModuleType:
    """A user's `.py` file as a module. What it raises while loading is the user's to mend."""
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _files(path: Path) -> list[Path]:
    """The file itself, or what a folder holds, in the order of their names."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))


def _read_source(source: str, data: Data, split: str) -> Iterator[Record]:
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            yield from _saved_dataset(path, data, split)
            return
        files = [file for file in _files(path) if file.suffix.lower() in READERS]
        if not files:
            raise UserError(f"{path}: no data file in this folder; readable are {', '.join(READERS)}")
        for file in files:
            yield from READERS[file.suffix.lower()](file, data)
    elif path.suffix.lower() == ".py" and path.is_file():
        yield from _generated(path, data, split)
    elif path.suffix.lower() in READERS:
        if not path.is_file():
            raise UserError(f"{source}: no such file, from {Path.cwd()}; name an existing file in `data.{split}`")
        yield from READERS[path.suffix.lower()](path, data)
    elif path.exists():
        raise UserError(f"{source}: cannot read `{path.suffix}` files; readable are {', '.join(READERS)}")
    else:
        yield from _hub(source, data, split)


def _text(path: Path, data: Data) -> Iterator[str]:
    """Lines of a text file without their ends; a byte order mark decides the encoding if there is one."""
    with path.open("rb") as stream:
        start = stream.read(4)
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if start.startswith(mark)), data.encoding)
    number = 0
    try:
        with path.open(encoding=encoding, newline=None) as lines:
            for line in lines:
                number += 1
                yield line.rstrip("\n")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: after line {number} it is not {encoding}; it looks like {_guess(path)}: "
            f"set `data.encoding: {_guess(path)}`, or save it as UTF-8"
        ) from None
    except LookupError:
        raise UserError(
            f"`data.encoding` is {data.encoding!r}, which Python does not know; for instance gb18030"
        ) from None


def _guess(path: Path) -> str:
    """The encoding that the start of the file looks like."""
    from charset_normalizer import from_bytes

    with path.open("rb") as stream:
        best = from_bytes(stream.read(200_000)).best()
    return best.encoding if best else "latin-1"


def _jsonl(path: Path, data: Data) -> Iterator[Record]:
    for number, line in enumerate(_text(path, data), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number}: broken JSON at column {error.colno}: {error.msg}; each line is one whole {{...}}"
                ) from None
            yield f"{path}:{number}", _mapping(record, f"{path}:{number}")


def _json(path: Path, data: Data) -> Iterator[Record]:
    try:
        content = json.loads("\n".join(_text(path, data)))
    except json.JSONDecodeError as error:
        hint = "; it looks like one object a line: name it .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}{hint}") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(f"{path}: a JSON file is a list of records [{{...}}, ...]; this is one object")
        content = lists[0]
    if not isinstance(content, list):
        raise UserError(f"{path}: a JSON file is a list of records [{{...}}, ...]")
    for number, record in enumerate(content, 1):
        yield f"{path}: record {number}", _mapping(record, f"{path}: record {number}")


def _mapping(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is an object {{...}}, this is a {type(record).__name__}")
    return record


def _table(path: Path, data: Data) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    lines = (line + "\n" for line in _text(path, data))
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: two columns have the same name; columns are {', '.join(header)}")
        start = reader.line_num + 1
        for values in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if values and len(values) != len(header):
                raise UserError(
                    f"{where}: {len(values)} values for {len(header)} columns ({', '.join(header)}); "
                    "put a value that holds the separator in double quotes"
                )
            if values:
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: broken {path.suffix[1:]}: {error}; check the quotes") from None


def _plain(path: Path, data: Data) -> Iterator[Record]:
    """Text records under the name `text`: lines, paragraphs between empty lines, or whole files."""
    lines = _text(path, data)
    if data.record == "file":
        yield str(path), {"text": "\n".join(lines)}
        return
    start, block = 1, list[str]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            start, block = (start, block) if block else (number, block)
            block.append(line)
        if block and (data.record == "line" or not line.strip()):
            yield f"{path}:{start}", {"text": "\n".join(block)}
            block = []
    if block:
        yield f"{path}:{start}", {"text": "\n".join(block)}


def _parquet(path: Path, data: Data) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", record
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


READERS: dict[str, Callable[[Path, Data], Iterator[Record]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet, ".txt": _plain,
}  # fmt: skip


def _generated(path: Path, data: Data, split: str) -> Iterator[Record]:
    rows = getattr(load_python(path), "rows", None)
    if rows is None:
        raise UserError(f"{path}: a data file in Python has a function `rows(split, **options)`")
    try:
        for number, record in enumerate(rows(split=split, **data.options), 1):
            yield f"{path}: row {number}", _mapping(record, f"{path}: row {number}")
    except TypeError as error:
        raise UserError(f"{path}: rows(split={split!r}, **{data.options}): {error}; see `data.options`") from error


def _saved_dataset(path: Path, data: Data, split: str) -> Iterator[Record]:
    """A folder that `datasets` wrote with `save_to_disk`."""
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        name = data.train_split if split == "train" else data.test_split
        if name not in loaded:
            raise UserError(f"{path}: no split `{name}`; there are {', '.join(loaded)}: set `data.{split}_split`")
        loaded = loaded[name]
    for number, record in enumerate(loaded, 1):
        yield f"{path}: row {number}", record


def _hub(name: str, data: Data, split: str) -> Iterator[Record]:
    import datasets

    wanted = data.train_split if split == "train" else data.test_split
    try:
        loaded = datasets.load_dataset(name, data.subset, split=wanted)
    except Exception as error:  # the hub client raises dozens of classes; each is the user's to act on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: no such file here, and no such data set could be read from the hub ({reason}); "
            f"name a local file or folder in `data.{split}`"
        ) from error
    for number, record in enumerate(loaded, 1):
        yield f"{name}[{wanted}]: row {number}", record


def _names(record: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in record) or "none"
