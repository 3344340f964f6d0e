"""Files to records: every format that a recipe may name, read one record at a time, with the place of each."""

import codecs
import csv
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from sft import UserError
from sft.hub import Place, is_address, place, why
from sft.recipe.fields import shown
from sft.recipe.schema import Data
from sft.rows.notes import OTHER_SPLIT, TWICE, UNREAD_FILES, Notes
from sft.rows.watch import content_of, is_library

Record = tuple[str, dict[str, Any]]
"""Where a record stands (`stories.jsonl:17`), and the record."""

FOR_TESTING = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)
"""Names of files that hold other rows than those to train on."""


def read(data: Data, split: str, notes: Notes | None = None) -> Iterator[Record]:
    """Records of `data.train` or `data.test`, columns renamed to the template's fields. What is passed over is noted.

    Raises UserError that names file and line for a file that is missing, empty, broken or not in its encoding.
    """
    source = data.train if split == "train" or data.test is None else data.test
    if data.options and not any(str(name).endswith(".py") for name in (data.train, data.test)):
        raise UserError(f"{source}: `data.options` are arguments of a .py file; take them away: data.options=null")
    count = 0
    for where, record in _read_source(source, data, split, notes or Notes()):
        for field, column in data.columns.items():
            if column not in record:
                raise UserError(
                    f"{where}: no column `{column}`, which `data.columns.{field}` names; there are {_names(record)}"
                )
        if not encodable(record):
            raise UserError(
                f"{where}: holds half a character (a lone surrogate, `\\ud800` to `\\udfff`); mend the text"
            )
        yield where, record | {field: record[column] for field, column in data.columns.items()}
        count += 1
        if count == data.limit:
            return
    if not count:
        raise UserError(f"{source}: no records in it")


def contents(data: Data, split: str) -> dict[str, str]:
    """Name -> SHA-256 of each file that `read` would read; for a `.py` file or the hub, that of its records."""
    source = Path(data.train if split == "train" or data.test is None else data.test)
    if source.suffix.lower() == ".py" or not source.exists():  # it may read other files, or it is on the hub
        digest = hashlib.sha256()
        for _, record in read(data, split):
            digest.update(repr(record).encode())
        return {source.name: digest.hexdigest()}
    return {str(f.relative_to(source.parent)): str(content_of(f)) for f in _files(source)}


def load_python(path: Path) -> ModuleType:
    """A user's `.py` file as a module, which may import others that lie beside it; they are read again as well.

    Raises UserError for what it raises while it loads, which is the user's to mend.
    """
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with _beside(path.resolve().parent):
            sys.modules[spec.name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{_raised_at(path, error)}: cannot be loaded: {type(error).__name__}: {error}") from error
    return module


_brought: set[str] = set()
"""Names of the modules that users' files have imported, which another user's file may mean otherwise."""


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Within, modules in a folder of the user's can be imported, and are read as they are now."""
    for name, module in list(sys.modules.items()):
        if name in _brought or _lies_in(folder, name, module):
            del sys.modules[name]
    _brought.clear()
    before, written = set(sys.modules), sys.dont_write_bytecode
    sys.path.append(str(folder))  # last, so that no file there stands in for a library
    sys.dont_write_bytecode = True  # an edit within a second would not outdate it
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _brought.update(name for name in {*sys.modules} - before if _is_users(name, sys.modules[name]))
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = written


def _lies_in(folder: Path, name: str, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return _is_users(name, module) and bool(file) and Path(str(file)).is_relative_to(folder)


def _is_users(name: str, module: ModuleType) -> bool:
    """Whether a module is of neither Python, an installed package nor this project."""
    ours = name.split(".")[0] in ("__main__", "sft", "eval", "data_templates")
    file = getattr(module, "__file__", None)
    return not ours and bool(file) and not is_library(os.path.realpath(str(file)))


def _raised_at(path: Path, error: BaseException) -> str:
    """`file:line` of the last line of a user's file that an exception passed through."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.absolute())
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


def encodable(value: Any) -> bool:
    """Whether all texts in it can be written as UTF-8."""
    if isinstance(value, dict | list):
        return all(map(encodable, value.values() if isinstance(value, dict) else value))
    try:
        return not isinstance(value, str) or value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _files(path: Path) -> list[Path]:
    """The file itself, or what a folder holds, in the order of their names."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))


def _read_source(source: str, data: Data, split: str, notes: Notes) -> Iterator[Record]:
    path = Path(source)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            yield from _saved_dataset(path, data, split)
            return
        there = _files(path)
        files = [file for file in there if file.suffix.lower() in READERS]
        if not files:
            raise UserError(f"{path}: no data file in this folder; readable are {', '.join(READERS)}")
        for file in there:
            if file.suffix.lower() not in READERS:
                notes.add(UNREAD_FILES, str(file))
            elif split == "train" and FOR_TESTING.search(str(file.relative_to(path).with_suffix(""))):
                notes.add(OTHER_SPLIT, str(file))
        for file in files:
            yield from READERS[file.suffix.lower()](file, data, notes)
    elif path.is_file():
        if path.suffix.lower() not in READERS | {".py": _generated}:
            raise UserError(f"{source}: cannot read `{path.suffix}` files; readable are {', '.join(READERS)}, .py")
        if path.suffix.lower() == ".py":
            yield from _generated(path, data, split)
        else:
            yield from READERS[path.suffix.lower()](path, data, notes)
    else:
        yield from _hub(source, data, split)


def check_sources(data: Data) -> None:
    """Raise UserError for a data file or folder that is not there, before anything is fetched or read."""
    for split in ("train", "test") if data.test else ("train",):
        source = data.train if split == "train" or data.test is None else data.test
        if not os.path.exists(source):
            _on_hub(source, split)


def _on_hub(source: str, split: str) -> Place:
    """The data set on the hub that is meant. Raises UserError for the name of a file, and for another address."""
    if is_address(source):
        return place(source, "dataset")
    suffixed = Path(source).suffix.lower() in (*READERS, ".py")
    if suffixed or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: no such file, from {Path.cwd()}; name an existing file in `data.{split}`")
    return place(source, "dataset")


def _text(path: Path, data: Data) -> Iterator[str]:
    """Lines of a text file without their ends; a byte order mark decides the encoding if there is one."""
    try:
        encoding = _encoding(path, data)
        with path.open(encoding=encoding, newline=None) as lines:
            for line in lines:
                yield line.rstrip("\n")
    except UnicodeDecodeError:
        number, rest = _undecodable(path, encoding)
        raise UserError(f"{path}:{number}: not {encoding}; {_advice(_guess(rest))}") from None
    except (LookupError, ValueError):
        raise UserError(
            f"`data.encoding` is {data.encoding!r}, which Python does not know; for instance gb18030"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


def _encoding(path: Path, data: Data) -> str:
    """That of a byte order mark, else `data.encoding`. UTF-16 without a mark would pass as UTF-8 full of NULs."""
    with path.open("rb") as stream:
        start = stream.read(4)
    marked = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
    if not marked and 0 in start[:2] and not codecs.lookup(data.encoding).name.startswith(("utf-16", "utf-32")):
        raise UserError(f"{path}:1: not {data.encoding}; {_advice(_guess(start))}")
    return marked or data.encoding


def _undecodable(path: Path, encoding: str) -> tuple[int, bytes]:
    """Number of the first line that is not in the encoding, and the bytes from there on that a guess needs.

    (Reading decodes a file in pieces of many lines, so that its error comes early.)
    """
    decoder, number = codecs.getincrementaldecoder(encoding)(), 1
    with path.open("rb") as stream:
        for line in stream:
            try:
                number += decoder.decode(line).count("\n")
            except UnicodeDecodeError:
                return number, line + stream.read(200_000)
    return number, b""


COMMON = ["utf_8", "gb18030", "big5", "cp932", "euc_jp", "cp949", "cp1252", "cp1250", "cp1251", "koi8_r", "cp1253",
          "cp1254", "cp1255", "cp1256"]  # fmt: skip
"""Encodings that files really come in, the more usual first: of those for one alphabet several fit most texts."""


def _guess(text: bytes) -> str | None:
    from charset_normalizer import from_bytes

    if 0 in text[:4]:
        return "utf-16-be" if text[0] == 0 else "utf-16-le"
    fits = [
        (match.chaos, -match.coherence, COMMON.index(name), name)
        for match in from_bytes(text, cp_isolation=COMMON)
        for name in match.could_be_from_charset
    ]
    return min(fits)[-1] if fits else None


def _advice(guess: str | None) -> str:
    return f"it looks like {guess}: set `data.encoding: {guess}`, or save it as UTF-8" if guess else "save it as UTF-8"


def _jsonl(path: Path, data: Data, notes: Notes) -> Iterator[Record]:
    twice: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=_object(twice))
    for number, line in enumerate(_text(path, data), 1):
        if line.strip():
            record = _parse(line, path, number, "; each line is one whole {...}", decoder)
            if twice:
                notes.add(TWICE, f"{path}:{number}: `{twice[0]}`")
                twice.clear()
            yield f"{path}:{number}", _mapping(record, f"{path}:{number}")


def _object(twice: list[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """What makes an object of its keys and values; a key that stands there twice is added to `twice`."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append(next(key for key in keys if keys.count(key) > 1))
        return found

    return made


def _parse(text: str, path: Path, first: int, hint: str, decoder: json.JSONDecoder) -> Any:
    """JSON that begins in line `first` of the file."""
    try:
        return decoder.decode(text)
    except json.JSONDecodeError as error:
        at = f"{path}:{first + error.lineno - 1}"
        raise UserError(f"{at}: broken JSON at column {error.colno}: {error.msg}{hint}") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"
        raise UserError(f"{path}:{first}: broken JSON: {reason}{hint}") from None


def _json(path: Path, data: Data, notes: Notes) -> Iterator[Record]:
    text = "\n".join(_text(path, data))
    if not text.strip():
        return
    lines = text.count("\n{") and not text.lstrip().startswith("[")
    twice: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=_object(twice))
    content = _parse(text, path, 1, "; it looks like one object a line: name it .jsonl" if lines else "", decoder)
    for key in twice:
        notes.add(TWICE, f"{path}: `{key}`")
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
        raise UserError(f"{where}: a record is an object {{...}}, this is {shown(record)}")
    return record


def _table(path: Path, data: Data, notes: Notes) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    lines = (line + "\n" for line in _text(path, data))
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    start = 1
    try:
        header = next((values for values in reader if values), [])
        if len(set(header)) < len(header):
            raise UserError(
                f"{path}:{reader.line_num}: two columns have the same name; columns are {', '.join(header)}"
            )
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            raise UserError(
                f"{path}:{reader.line_num}: one column, `{header[0]}`; separate columns with commas, "
                "or with tabs in a .tsv file"
            )
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
        raise UserError(f"{path}:{start}: broken {path.suffix[1:]}: {error}; check the quotes of this row") from None


def _plain(path: Path, data: Data, notes: Notes) -> Iterator[Record]:
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


def _parquet(path: Path, data: Data, notes: Notes) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        number, file = 0, pyarrow.parquet.ParquetFile(path)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise UserError(f"{path}: two columns have the same name; columns are {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=1000):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}; write it again") from None


READERS: dict[str, Callable[[Path, Data, Notes], Iterator[Record]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet, ".txt": _plain,
}  # fmt: skip


def _generated(path: Path, data: Data, split: str) -> Iterator[Record]:
    rows = getattr(load_python(path), "rows", None)
    if not callable(rows):
        raise UserError(f"{path}: a data file in Python has a function `rows(split, **options)`")
    try:
        inspect.signature(rows).bind(split=split, **data.options)
    except TypeError as error:
        raise UserError(
            f"{path}: rows{inspect.signature(rows)} does not take `data.options` {data.options}: {error}"
        ) from None
    try:
        for number, record in enumerate(rows(split=split, **data.options), 1):
            yield f"{path}: row {number}", _mapping(record, f"{path}: row {number}")
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{_raised_at(path, error)}: rows() failed: {type(error).__name__}: {error}") from error


def _saved_dataset(path: Path, data: Data, split: str) -> Iterator[Record]:
    """A folder that `datasets` wrote with `save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's, json's and its own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a whole folder of `save_to_disk`: {reason}; save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        name = data.train_split if split == "train" else data.test_split
        if name not in loaded:
            raise UserError(f"{path}: no split `{name}`; there are {', '.join(loaded)}: set `data.{split}_split`")
        loaded = loaded[name]
    for number, record in enumerate(loaded, 1):
        yield f"{path}: row {number}", record


def _hub(source: str, data: Data, split: str) -> Iterator[Record]:
    (name, revision), wanted = _on_hub(source, split), data.train_split if split == "train" else data.test_split
    import datasets

    try:
        loaded = datasets.load_dataset(name, data.subset, split=wanted, revision=revision)
    except Exception as error:  # the hub client raises dozens of classes; each is the user's to act on
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            why(name, "dataset", revision, error)
            or f"{name}: is no file here, and as a data set of the hub it cannot be read ({reason}); "
            f"name a local file or folder in `data.{split}`"
        ) from error
    for number, record in enumerate(loaded, 1):
        yield f"{name}[{wanted}]: row {number}", record


def _names(record: dict[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in record) or "none"
