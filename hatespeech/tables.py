"""Files of rows, read and written: CSV, JSONL and Parquet, alone or in folders, on any path that fsspec knows.

The one place that does it, for training, the shell, the page and bulk. What it promises:

- Nothing but the answers is ever changed. A field of CSV stays the characters it was, a line of JSONL the line it was,
  a column of Parquet its type.
- A row that can't be read is kept, with an error that says why. What can't be read as rows at all (a quote that is
  never closed, bytes of another encoding in the header) ends in a UserError that names the file and the line.
- One rule says what a text is, in all formats (`text_in`).

CSV is read by the standard library's reader, in its strict mode: of DuckDB, Polars and PyArrow none keeps the fields of
a row that has too many, or a row with a byte of another encoding.
"""

import bz2
import codecs
import csv
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from decimal import Decimal
from urllib.parse import unquote

import fsspec
import numpy as np
import pyarrow
from fsspec.core import url_to_fs
from pyarrow import parquet

from hatespeech import UserError

# By the end of a file's name, before that of a compression.
KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
ROWS_AT_ONCE = 1_000
csv.field_size_limit(sys.maxsize)  # a cell may be of any size
# What other programs leave beside their data: hidden files and folders, markers, half-written parts.
NOT_DATA = (".*", "_*", "__MACOSX", "*~")
# Longer ones first: UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


# Fields, text, what is wrong, and the number of the first line.
Row = tuple[list[str], str | None, str, int]


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written. sep_line: it begins with `sep=;`, as Excel's do."""

    delimiter: str
    encoding: str
    line_end: str
    sep_line: bool
    header: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of a file, or of all files of a folder, which are of one kind.

    columns: the names of all files' columns, those of the first file first; of JSONL none are known beforehand.
    dialects: of CSV, each file's. schema: of Parquet, one that all files' rows fit. added: names that a writer will
    add, which no row may have. folders: of each file, what folders named `column=value` on the way to it say.
    """

    fs: fsspec.AbstractFileSystem
    files: tuple[str, ...]
    kind: str
    ending: str
    text_column: str
    columns: tuple[str, ...] = ()
    dialects: tuple[Dialect, ...] = ()
    schema: pyarrow.Schema | None = None
    added: tuple[str, ...] = ()
    folders: tuple[dict[str, str], ...] = ()

    def units(self) -> list[tuple[int, int | None]]:
        """What can be read apart: (number of a file, a row group of Parquet)."""
        if self.kind != "parquet":
            return [(number, None) for number in range(len(self.files))]
        found = []
        for number, file in enumerate(self.files):
            with _named(file), self.fs.open(file, "rb") as opened:
                found += [(number, group) for group in range(parquet.ParquetFile(opened).num_row_groups)]
        return found

    def batches(self, unit: tuple[int, int | None] | None = None) -> Iterator[pyarrow.Table]:
        """Batches of rows, of one unit or of all, in order.

        The row's own columns are called c0, c1 ... (of JSONL the whole line is c0), so that no name is in the way.
        Beside them: `text` (null where the row has none), `error` (why it can't be classified, else empty) and `line`
        (the number of the row's first line in its file, of Parquet the row's).
        Raises UserError where a file can't be read.
        """
        read = {"csv": self._csv_batches, "jsonl": self._json_batches, "parquet": self._parquet_batches}[self.kind]
        for number, group in [unit] if unit else self.units():
            with _named(self.files[number]):
                yield from read(number, group)

    def _csv_batches(self, number: int, _group) -> Iterator[pyarrow.Table]:
        header = self.dialects[number].header
        # Where each of the table's columns stands in this file's rows; a column that only other files have is empty.
        fields_here = [*header, *self.folders[number]]
        from_field = [fields_here.index(name) if name in fields_here else None for name in self.columns]
        if self.columns == header:  # a name may be there twice
            from_field = list(range(len(header)))
        yield from _batched(self._csv_rows(number), from_field)

    def _csv_rows(self, number: int) -> Iterator[Row]:
        dialect, file, folders = self.dialects[number], self.files[number], self.folders[number]
        n_fields, text_field = len(dialect.header), dialect.header.index(self.text_column)
        with self._lines(number, dialect.encoding) as lines:
            n_skipped = 0
            if dialect.sep_line:
                n_skipped = next(n for n, line in enumerate(lines, 1) if line.strip("\r\n"))
            records = _records(lines, dialect.delimiter, file, 1 + n_skipped)
            next(records)
            for line, fields, error in records:
                if not error and len(fields) != n_fields:
                    error = f"{len(fields)} fields, where the header has {n_fields}"
                text, no_text = text_in(fields[text_field], dialect.encoding) if not error else (None, "")
                # The fields of a row with too many stay together in the last column.
                extra = [dialect.delimiter.join(fields[n_fields - 1 :])] if len(fields) > n_fields else []
                fields = fields[: n_fields - 1] + extra if extra else fields + [""] * (n_fields - len(fields))
                yield [*fields, *folders.values()], text, error or no_text, line

    def _json_batches(self, number: int, _group) -> Iterator[pyarrow.Table]:
        yield from _batched(self._json_rows(number), [0])

    def _json_rows(self, number: int) -> Iterator[Row]:
        folders = json.dumps(self.folders[number])[1:-1]
        with self._lines(number, "utf-8-sig") as lines:
            for line_number, line in enumerate(lines, 1):
                line = line.strip()
                if not line:
                    continue
                value = json_object(line)
                if taken := set(self.added) & {*(value or ()), *self.folders[number]}:
                    raise _taken(f"{self.files[number]}, line {line_number}", taken)
                if doubled := self.folders[number].keys() & (value or {}).keys():
                    where = f"{self.files[number]}, line {line_number}"
                    raise UserError(f"{where}: its folder is called as a member is ({', '.join(doubled)}): rename one")
                if value is None:
                    text, error = None, "the line is not a JSON object"
                    raw = line.encode("utf-8", "surrogateescape")
                    line = json.dumps({"line": raw.decode("utf-8", "backslashreplace")})
                else:
                    text, error = text_in(value.get(self.text_column))
                if folders:
                    line = _extended(line, folders)
                yield [line], text, error, line_number

    def _parquet_batches(self, number: int, group: int | None) -> Iterator[pyarrow.Table]:
        with self.fs.open(self.files[number], "rb") as opened:
            file = parquet.ParquetFile(opened)
            line = 1 + sum(file.metadata.row_group(before).num_rows for before in range(group))
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                rows = pyarrow.Table.from_batches([batch])
                if rows.schema.names != self.schema.names:
                    rows = self._with_all_columns(rows, self.folders[number])
                texts = [text_in(value) for value in _cells(rows[self.text_column])]
                try:
                    rows = rows.cast(self.schema)
                except (pyarrow.ArrowInvalid, ValueError) as error:
                    where = f"{self.files[number]}, rows {line} to {line + len(rows) - 1}"
                    raise UserError(f"{where}: a number does not fit the type that all files together have") from error
                rows = rows.rename_columns([f"c{place}" for place in range(len(self.schema))])
                rows = rows.append_column("text", pyarrow.array([text for text, _ in texts], pyarrow.string()))
                rows = rows.append_column("error", pyarrow.array([error for _, error in texts], pyarrow.string()))
                yield rows.append_column("line", pyarrow.array(range(line, line + len(texts)), pyarrow.int64()))
                line += len(texts)

    def _with_all_columns(self, rows: pyarrow.Table, folders: dict[str, str]) -> pyarrow.Table:
        columns = []
        for field in self.schema:
            if field.name in folders:
                columns.append(pyarrow.array([folders[field.name]] * len(rows), pyarrow.string()))
            elif field.name in rows.column_names:
                columns.append(rows[field.name])
            else:
                columns.append(pyarrow.nulls(len(rows), field.type))
        return pyarrow.table(columns, names=self.schema.names)

    @contextmanager
    def _lines(self, number: int, encoding: str) -> Iterator[Iterator[str]]:
        # Bytes of another encoding stay as they are, in surrogates (PEP 383): their row is kept, and refused.
        errors = _escaping(encoding)
        with self.fs.open(self.files[number], "rb") as raw, _decompressed(raw, self.files[number]) as opened:
            newline = "" if self.kind == "csv" else "\n"  # JSONL's lines end with \n alone
            yield iter(io.TextIOWrapper(opened, encoding=encoding, errors=errors, newline=newline))

    def described(self) -> str:
        """How the first file is read, for people: `CSV, semicolon between fields, UTF-8`."""
        if self.kind != "csv":
            return {"jsonl": "JSON lines", "parquet": "Parquet"}[self.kind]
        first = self.dialects[0]
        between = DELIMITERS.get(first.delimiter, repr(first.delimiter))
        return f"CSV, {between} between fields, {first.encoding.removesuffix('-sig').upper()}"


def open_table(
    source: str,
    *,
    text_column: str = "text",
    delimiter: str | None = None,
    encoding: str | None = None,
    added: Sequence[str] = (),
) -> Table:
    """Look at the files of source, without reading their rows.

    delimiter, encoding: of CSV, where they are not to be found out. added: names that must be free.
    Raises UserError: no such file, no rows, files of several kinds, no such column or two of them, an encoding that is
    not UTF-8 and was not named, columns whose types do not go together.
    """
    fs, files, root = _find(source)
    endings = sorted({_ending(file) for file in files})
    kinds = {KINDS[ending] for ending in endings}
    if len(kinds) > 1:
        raise UserError(f"{source}: files of several kinds ({', '.join(endings)}): give those of one kind")
    _check_delimiter(delimiter)
    common = {"fs": fs, "kind": kinds.pop(), "ending": whole_ending(files[0]), "text_column": text_column}
    common |= {"added": tuple(added)}
    if common["kind"] == "parquet":
        table = _open_parquet(common, files, root)
    elif common["kind"] == "csv":
        table = _open_csv(common, files, root, delimiter, encoding)
    else:
        if encoding and _known_encoding(encoding) != "utf-8":
            raise UserError(f"{source}: lines of JSON are UTF-8, not {encoding}")
        for file in files:
            with _named(file), fs.open(file, "rb") as raw, _decompressed(raw, file) as opened:
                if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    raise UserError(f"{file}: lines of JSON are UTF-8, and this file is UTF-16")
        table = Table(files=tuple(files), folders=tuple(_folders(file, root) for file in files), **common)
    if taken := set(added) & set(table.columns):
        raise _taken(source, taken)
    return table


def columns_of(source: str, *, delimiter: str | None = None, encoding: str | None = None) -> tuple[list[str], str]:
    """The names of a file's columns, from which one is to be chosen, and how the file is read, for people.

    Of JSONL, the members of its first thousand objects. Raises UserError as open_table does.
    """
    _check_delimiter(delimiter)
    fs, files, _ = _find(source)
    kind = KINDS[_ending(files[0])]
    common = {"fs": fs, "kind": kind, "ending": "", "text_column": "", "added": ()}
    if kind == "parquet":
        with _named(files[0]), fs.open(files[0], "rb") as opened:
            return list(parquet.read_schema(opened).names), Table(files=(), **common).described()
    if kind == "jsonl":
        table = Table(files=tuple(files[:1]), folders=({},), **common)
        first = next(iter(table.batches()), None)
        lines = first["c0"].to_pylist() if first else []
        objects = [json_object(line.decode("utf-8", "surrogatepass")) or {} for line in lines]
        names = dict.fromkeys(name for each in objects for name in each)
        return [name for name in names if name.isprintable()], table.described()
    with _named(files[0]):
        dialect = _dialect(fs, files[0], delimiter, encoding)
    if dialect is None:
        raise UserError(f"{files[0]}: is empty, without a header")
    return list(dialect.header), Table(files=(), dialects=(dialect,), **common).described()


def _open_csv(common: dict, files: list[str], root: str, delimiter: str | None, encoding: str | None) -> Table:
    dialects, column = {}, common["text_column"]
    for file in files:
        with _named(file):
            dialect = _dialect(common["fs"], file, delimiter, encoding)
        if dialect is None:
            if len(files) == 1:
                raise UserError(f"{file}: is empty, without a header")
            print(f"{file} is empty: left out", file=sys.stderr)
            continue
        _check_text_column(file, dialect.header, column)
        dialects[file] = dialect
    folders = {file: _folders(file, root) for file in dialects}
    if not dialects:
        raise UserError(f"{root}: all files are empty")
    names = {file: (*dialect.header, *folders[file]) for file, dialect in dialects.items()}
    columns = next(iter(names.values()))
    for own in names.values():
        columns += tuple(dict.fromkeys(name for name in own if name not in columns))
    encodings = {dialect.encoding.removesuffix("-sig"): file for file, dialect in dialects.items()}
    if len(encodings) > 1:
        said = ", ".join(f"{file} is {encoding.upper()}" for encoding, file in encodings.items())
        raise UserError(f"files of several encodings ({said}): give them one")
    for file, own in names.items():
        # Alone, a file may have a name twice: its fields go by their place.
        if (own != columns or folders[file]) and (doubled := _doubled(own)):
            raise UserError(f"{file}: two columns have one name ({', '.join(doubled)}): rename one")
    if len(dialects) > 1 and (doubled := _doubled(columns)):
        raise UserError(f"{next(iter(names))}: two columns have one name ({', '.join(doubled)}): rename one")
    first = next(iter(dialects.values()))
    for text in (*common["added"], *columns, *(value for said in folders.values() for value in said.values())):
        try:
            text.encode(first.encoding)
        except UnicodeEncodeError as error:
            raise UserError(f"{root}: {text!r} can't be written in {first.encoding.upper()}") from error
    chosen = tuple(dialects)
    shape = {"columns": columns, "dialects": tuple(dialects.values()), "folders": tuple(folders[f] for f in chosen)}
    return Table(files=chosen, **common, **shape)


def _open_parquet(common: dict, files: list[str], root: str) -> Table:
    schema, column = None, common["text_column"]
    for file in files:
        with _named(file), common["fs"].open(file, "rb") as opened:
            own = parquet.read_schema(opened)
        _check_text_column(file, own.names, column)
        if not _may_hold_text(own.field(column).type):
            raise UserError(f"{file}: the column {column} holds {own.field(column).type}, and no text")
        for name, _ in _folders(file, root).items():
            own = own.append(pyarrow.field(name, pyarrow.string()))
        if len(files) > 1:  # where a file has no such column, its rows have none
            own = pyarrow.schema([field.with_nullable(True) for field in own], own.metadata)
        if (len(files) > 1 or _folders(file, root)) and (doubled := _doubled(own.names)):
            raise UserError(f"{file}: two columns have one name ({', '.join(doubled)}): rename one")
        try:
            together = [schema, own] if schema else [own]
            schema = pyarrow.unify_schemas(together, promote_options="permissive") if schema else own
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            first, second = together
            other = next((f for f in second if f.name in first.names and f.type != first.field(f.name).type), None)
            what = f"the column {other.name} is {other.type}, before it was {first.field(other.name).type}"
            raise UserError(f"{file}: {what}: give all files one type") from error
    folders = tuple(_folders(file, root) for file in files)
    return Table(files=tuple(files), columns=tuple(schema.names), schema=schema, folders=folders, **common)


@contextmanager
def writing(table: Table, file, name: str, added: dict[str, type], about: dict | None = None) -> Iterator["Writer"]:
    """A Writer into file, open for bytes, compressed as its name says. about: what Parquet's metadata is to tell."""
    opener = _opener(name)
    with opener(file, "wb") if opener else nullcontext(file) as opened:
        writer = Writer(table, opened, added, about)
        yield writer
        writer.close()


class Writer:
    """Writes a table's rows with columns added, as the table's files are written.

    added: names and Python types of what comes after the row's own columns.
    """

    def __init__(self, table: Table, file, added: dict[str, type], about: dict | None = None):
        kinds = {str: pyarrow.string(), float: pyarrow.float64(), bool: pyarrow.bool_()}
        self._table, self._file, self._added = table, file, {name: kinds[kind] for name, kind in added.items()}
        if table.kind == "csv":
            dialect = table.dialects[0]
            self._encode = codecs.getincrementalencoder(dialect.encoding)(_escaping(dialect.encoding)).encode
            self._line = io.StringIO()
            # With this line end the writer quotes a lone \r in all versions of Python: what is written reads back.
            self._csv = csv.writer(self._line, delimiter=dialect.delimiter, lineterminator="\r\n")
            if dialect.sep_line:
                file.write(self._encode(f"sep={dialect.delimiter}{dialect.line_end}"))
            self._write_line([*table.columns, *added])
        elif table.kind == "parquet":
            fields = [*table.schema, *(pyarrow.field(name, kind) for name, kind in self._added.items())]
            metadata = {b"hatespeech": json.dumps(about).encode()} if about else {}
            self._schema = pyarrow.schema(fields, (table.schema.metadata or {}) | metadata)
            self._parquet = parquet.ParquetWriter(file, self._schema)

    def write(self, rows: pyarrow.Table, answers: dict[str, list]) -> None:
        """rows: as `batches` gave them. answers: a value for each row, by the names of `added`."""
        own = [name for name in rows.column_names if re.fullmatch(r"c\d+", name)]
        if self._table.kind == "parquet":
            columns = [rows[name] for name in own]
            columns += [pyarrow.array(answers[name], kind) for name, kind in self._added.items()]
            self._parquet.write_table(pyarrow.table(columns, schema=self._schema))
            return
        values = [[value.decode("utf-8", "surrogatepass") for value in rows[name].to_pylist()] for name in own]
        added = zip(*(answers[name] for name in self._added), strict=True)
        for fields, answer in zip(zip(*values, strict=True), added, strict=True):
            if self._table.kind == "csv":
                self._write_line([*fields, *answer])
            else:
                line = _extended(fields[0], json.dumps(dict(zip(self._added, answer, strict=True)))[1:-1])
                self._file.write(f"{line}\n".encode("utf-8", "surrogateescape"))

    def _write_line(self, fields: list) -> None:
        self._line.seek(0)
        self._line.truncate()
        self._csv.writerow(fields)
        self._file.write(self._encode(self._line.getvalue()[:-2] + self._table.dialects[0].line_end))

    def close(self) -> None:
        """What a format keeps for the end of a file."""
        if self._table.kind == "parquet":
            self._parquet.close()


def content_of(table: Table) -> str:
    """Changes when the content of a file does, or which files there are: what a resumed run must find the same.

    Made of each file's ETag, where its file system keeps one, else of its sha256.
    """
    found = []
    for file, folders in zip(table.files, table.folders, strict=True):
        with _named(file):
            tag = table.fs.info(file).get("ETag")
            if not tag:
                with table.fs.open(file, "rb") as opened:
                    tag = hashlib.file_digest(opened, "sha256").hexdigest()
        found.append([file.rpartition("/")[2], folders, tag])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _cells(column: pyarrow.ChunkedArray) -> list:
    """A column's values. Strings come as bytes, so that one that is no UTF-8 spoils no other."""
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind):
        return column.cast(kind).cast(pyarrow.large_binary()).to_pylist()
    if pyarrow.types.is_float32(kind):  # as written: 0.1, and not 0.10000000149011612
        return [value if value is None else float(str(np.float32(value))) for value in column.to_pylist()]
    return column.to_pylist()


def text_in(value: object, encoding: str = "utf-8") -> tuple[str | None, str]:
    """The text that a cell holds, or None; and what is wrong with it, else nothing.

    A string is a text, bytes are one in UTF-8, a number is its written form. Null and NaN are no text. Anything else
    (a list, an object, true, a date) is wrong: what of it would be the text, nobody said.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if value is None or (isinstance(value, float) and value != value):
        return None, ""
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value), ""
    if not isinstance(value, str):
        return None, f"the text is no text, but of the type {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if 0xDC80 <= ord(value[error.start]) <= 0xDCFF:  # PEP 383's
            place = len(value[: error.start].encode())
            return None, f"the text is not {encoding.removesuffix('-sig').upper()} (byte {place})"
        return None, f"the text holds a lone surrogate (at {error.start}), which is no character"
    return value, ""


def json_object(line: str) -> dict | None:
    """A line's JSON object, its numbers as they are written; None where it is none. NaN and Infinity are no JSON."""
    try:
        value = json.loads(line, parse_int=str, parse_float=str, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def no_constant(name: str):
    """json's parse_constant, where NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is no JSON")


def ending_of(name: str) -> str | None:
    """The end of a name that tells a file's kind, without that of a compression; None where it is no table's."""
    ending = _ending(name)
    if ending == ".parquet" and whole_ending(name) != ending:  # Parquet compresses by itself
        return None
    return ending if ending in KINDS else None


def whole_ending(name: str) -> str:
    """The end of a name, with that of a compression: `.csv.gz`."""
    return _ending(name) + next((end for end in COMPRESSIONS if name.lower().endswith(end)), "")


def _ending(name: str) -> str:
    name = name.rpartition("/")[2].lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    _, dot, ending = name.rpartition(".")
    return dot + ending


def _find(source: str) -> tuple[fsspec.AbstractFileSystem, list[str], str]:
    """The file system, the files that hold rows, sorted, and the folder they are in."""
    if "\0" in source:
        raise UserError("a path holds no zero byte")
    try:
        fs, path = url_to_fs(source)
        fs.exists(path)
    except Exception as error:
        raise UserError(f"{source}: can't be opened ({type(error).__name__}: {error})".splitlines()[0]) from error
    path = path.rstrip("/")
    with _named(source):
        if fs.isfile(path):
            if ending_of(path) is None:
                raise UserError(f"{source}: a table is a file of {', '.join(KINDS)} (or of these with .gz, .bz2, .xz)")
            return fs, [path], path.rpartition("/")[0]
        found, left_out = [], []
        for name in sorted(fs.find(path)):
            inside = name[len(path) :].strip("/").split("/")
            hidden = (part for part in inside if "=" not in part)  # a folder that is a column is none
            if not any(fnmatch.fnmatchcase(part, pattern) for part in hidden for pattern in NOT_DATA):
                (found if ending_of(name) else left_out).append(name)
    if not found:
        raise UserError(f"{source}: no such file, or a folder without files of {', '.join(KINDS)}")
    if left_out:
        print(f"left out, being no tables: {', '.join(left_out[:5])}{' ...' * (len(left_out) > 5)}", file=sys.stderr)
    return fs, found, path


def _folders(file: str, root: str) -> dict[str, str]:
    """What folders named `column=value` between root and file say, as Hive and Spark write them."""
    parts = [part.partition("=") for part in file[len(root) :].strip("/").split("/")[:-1]]
    empty = "__HIVE_DEFAULT_PARTITION__"
    return {name: "" if value == empty else unquote(value) for name, equals, value in parts if equals and name}


def _dialect(fs, file: str, delimiter: str | None, encoding: str | None) -> Dialect | None:
    """How a CSV file is written, found out from its beginning; None where it is empty."""
    with fs.open(file, "rb") as raw, _decompressed(raw, file) as opened:
        start = opened.read(1 << 16)
    mark, found = next(((mark, name) for mark, name in _MARKS if start.startswith(mark)), (b"", None))
    if not start.removeprefix(mark).strip(b"\r\n\0"):
        return None
    encoding = found or _known_encoding(encoding) or "utf-8"
    with fs.open(file, "rb") as raw, _decompressed(raw, file) as opened:
        lines = iter(io.TextIOWrapper(opened, encoding=encoding, errors=_escaping(encoding), newline=""))
        first = next((line for line in lines if line.strip("\r\n")), "")
        line_end = re.search(r"(\r\n|\n|\r|)$", first)[0] or "\n"
        sep_line = re.fullmatch(r"sep=(.)(\r\n|\n|\r)", first)
        if sep_line:
            delimiter = delimiter or sep_line[1]
            first = next((line for line in lines if line.strip("\r\n")), "")
        if "\0" in first:
            raise UserError(f"{file}, line 1: holds zero bytes, as UTF-16 does: name its encoding (utf-16-le)")
        try:
            first.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{file}, line 1: not {encoding.upper()} (byte {len(first[: error.start].encode())}), "
                f"but perhaps {_guess(start)}: name its encoding"
            ) from error
        if delimiter is None and _ending(file) == ".tsv":
            delimiter = "\t"
        # The header may go on over several lines, in quotes.
        beginning = [first, *(line for line, _ in zip(lines, range(200), strict=False))]
        candidates = [delimiter] if delimiter else list(DELIMITERS)
        headers = {each: next(csv.reader(beginning, delimiter=each), []) for each in candidates}
    delimiter = max(headers, key=lambda each: len(headers[each]))
    try:
        next(csv.reader(beginning, delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise UserError(f"{file}, line 1: a quote that opens in the header is not closed as it should be") from error
    return Dialect(delimiter, encoding, line_end, bool(sep_line), tuple(headers[delimiter]))


def _check_delimiter(delimiter: str | None) -> None:
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise UserError(f"a delimiter is one character, no quote and no line end, not {delimiter!r}")


def _guess(start: bytes) -> str:
    import charset_normalizer

    best = charset_normalizer.from_bytes(start).best()
    return best.encoding if best else "latin-1"


# They change bytes that they don't know, or line ends.
_NO_TABLES_ENCODING = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "utf_7")


def _known_encoding(name: str | None) -> str | None:
    if not name:
        return None
    try:
        codec = codecs.lookup(name)
        if not codec._is_text_encoding or codec.name.replace("-", "_") in _NO_TABLES_ENCODING:
            raise LookupError(name)
    except (LookupError, ValueError) as error:
        raise UserError(f"there is no encoding {name}: utf-8, utf-16, cp1252 and latin-1 are some") from error
    return codec.name


def _escaping(encoding: str) -> str:
    return "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"


def _records(lines: Iterator[str], delimiter: str, file: str, line: int) -> Iterator[tuple[int, list[str], str]]:
    """(first line, fields, what is wrong) of each record of a CSV file; blank lines are none. line: the first one's.

    A record that goes wrong within one line is a row with an error. One that goes wrong after several has likely taken
    in other rows, behind a quote that somebody forgot: UserError.
    """
    taken: list[str] = []  # the lines of the record that is being read

    def each_line() -> Iterator[str]:
        for each in lines:
            taken.append(each)
            yield each

    reader = csv.reader(each_line(), delimiter=delimiter, strict=True)
    while True:
        first, error = line, ""
        taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            if len(taken) > 1 or "end of data" in str(problem):
                raise UserError(
                    f"{file}, line {first}: a quote that opens in this row is not closed as it should be "
                    f"(looked for as far as line {first + len(taken) - 1})"
                ) from problem
            # With each quote as the character it is, so that none is lost.
            fields = next(csv.reader(taken, delimiter=delimiter, quoting=csv.QUOTE_NONE))
            error = "a quoted field goes on behind its closing quote: a quote inside a field is written twice"
        line += len(taken)
        if fields:
            yield first, fields, error


def _batched(rows: Iterator[Row], from_field: list[int | None]) -> Iterator[pyarrow.Table]:
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield _as_batch(some, from_field)


def _as_batch(rows: list[Row], from_field: list[int | None]) -> pyarrow.Table:
    values, texts, errors, lines = zip(*rows, strict=True)
    columns = {}
    for place, field in enumerate(from_field):
        cells = ["" if field is None else fields[field] for fields in values]
        columns[f"c{place}"] = pyarrow.array(
            [cell.encode("utf-8", "surrogatepass") for cell in cells], pyarrow.binary()
        )
    columns |= {"text": pyarrow.array(texts, pyarrow.string()), "error": pyarrow.array(errors, pyarrow.string())}
    return pyarrow.table(columns | {"line": pyarrow.array(lines, pyarrow.int64())})


def _extended(line: str, members: str) -> str:
    """A JSON object's line with members added at its end, the rest as it was."""
    start = line[:-1].rstrip()
    return f"{start}{'' if start == '{' else ', '}{members}}}"


def _check_text_column(file: str, names: Sequence[str], column: str) -> None:
    if column not in names:
        raise UserError(f"{file}: no column {column} (there are: {', '.join(names)}): say which one holds the texts")
    if list(names).count(column) > 1:
        raise UserError(f"{file}: two columns are called {column}: rename one")


def _doubled(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if list(names).count(name) > 1]


def _taken(where: str, names: set[str]) -> UserError:
    return UserError(
        f"{where} has columns that would be added: {', '.join(sorted(names))}. "
        "Give those that are added a prefix (--prefix model_), or rename yours"
    )


def _may_hold_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    tests += (types.is_binary_view, types.is_fixed_size_binary, types.is_integer, types.is_floating, types.is_decimal)
    return any(test(kind) for test in (*tests, types.is_null))


@contextmanager
def _decompressed(raw, name: str):
    opener = _opener(name)
    with opener(raw, "rb") if opener else nullcontext(raw) as opened:
        yield opened


def _opener(name: str):
    return next((opener for end, opener in COMPRESSIONS.items() if name.lower().endswith(end)), None)


@contextmanager
def _named(file: str) -> Iterator[None]:
    """What goes wrong in reading a file, as a UserError that names it. Their own words may quote rows."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except UnicodeError as error:
        where = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        encoding = error.encoding.upper() if isinstance(error, UnicodeDecodeError) else "of the encoding that was named"
        raise UserError(f"{file}: not {encoding}{where}") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: its compression is damaged ({type(error).__name__})") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: can't be read as Parquet ({type(error).__name__})") from error
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or type(error).__name__})") from error
