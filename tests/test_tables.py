"""Files of rows as real programs write them: each is read as it is meant, and nothing but the answers changes."""

import bz2
import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hatespeech import UserError, tables

ADDED = {"label": str, "p": float, "abstain": bool}


def put(folder, files: dict[str, bytes]) -> str:
    """Write files into a folder; returns the file's path, or the folder's where there are several."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / next(iter(files)) if len(files) == 1 else folder)


def rows_of(source: str, **options) -> list[tuple[int, str | None, str]]:
    """(line, text, error) of each row."""
    table = tables.open_table(source, **options)
    batches = [rows.select(["line", "text", "error"]).to_pylist() for rows in table.batches()]
    return [tuple(row.values()) for batch in batches for row in batch]


def answered(source: str, name: str, **options) -> bytes:
    """The file as written with ADDED."""
    table = tables.open_table(source, added=list(ADDED), **options)
    out = io.BytesIO()
    with tables.writing(table, out, name, ADDED) as writer:
        for rows in table.batches():
            writer.write(rows, {"label": ["Hate"] * len(rows), "p": [0.5] * len(rows), "abstain": [True] * len(rows)})
    return out.getvalue()


MARKED = b"\xef\xbb\xbf"
CSV = {
    "as it should be": (b"id,text\n007,a day\n", [(2, "a day", "")], b"id,text,{}\n007,a day,{}\n"),
    # The mark at the beginning is no part of the first name, and stays in the file.
    "a byte order mark": (MARKED + b"text,id\na day,007\n", [(2, "a day", "")], MARKED + b"text,id,{}\na day,007,{}\n"),
    "a mark and a quoted name": (MARKED + b'"text",id\na,1\n', [(2, "a", "")], MARKED + b"text,id,{}\na,1,{}\n"),
    "UTF-16": (
        "id,text\n1,caf\u00e9 \U0001f600\n".encode("utf-16"),
        [(2, "caf\u00e9 \U0001f600", "")],
        "id,text,{}\n1,caf\u00e9 \U0001f600,{}\n".encode("utf-16"),
    ),
    "Windows' line ends": (b"id,text\r\n1,a\r\n", [(2, "a", "")], b"id,text,{}\r\n1,a,{}\r\n"),
    "an old Mac's line ends": (b"id,text\r1,a\r2,b\r", [(2, "a", ""), (3, "b", "")], b"id,text,{}\r1,a,{}\r2,b,{}\r"),
    "no line end at the end": (b"id,text\n1,a", [(2, "a", "")], b"id,text,{}\n1,a,{}\n"),
    "a carriage return in a field": (b'id,text\n1,"a\rb"\n', [(2, "a\rb", "")], b'id,text,{}\n1,"a\rb",{}\n'),
    "lines in a field": (b'id,text\n1,"a\n\nb"\n2,c\n', [(2, "a\n\nb", ""), (5, "c", "")], None),
    "blank lines": (b"id,text\n\n1,a\n\n\n2,b\n", [(3, "a", ""), (6, "b", "")], b"id,text,{}\n1,a,{}\n2,b,{}\n"),
    "a semicolon": (b"id;text\n1;a, b\n", [(2, "a, b", "")], b"id;text;{}\n1;a, b;{}\n"),
    "a tab": (b"id\ttext\n1\ta, b\n", [(2, "a, b", "")], b"id\ttext\t{}\n1\ta, b\t{}\n"),
    "a bar": (b"id|text\n1|a, b\n", [(2, "a, b", "")], b"id|text|{}\n1|a, b|{}\n"),
    "Excel's first line": (b"sep=;\r\nid;text\r\n1;a\r\n", [(3, "a", "")], b"sep=;\r\nid;text;{}\r\n1;a;{}\r\n"),
    "one column": (b"text\na\n", [(2, "a", "")], b"text,{}\na,{}\n"),
    "a name twice": (b"n,text,n\n1,a,2\n", [(2, "a", "")], b"n,text,n,{}\n1,a,2,{}\n"),
    "a field too many": (
        b"id,text,lang\n1,a well, b,en\n2,c,en\n",
        [(2, None, "4 fields, where the header has 3"), (3, "c", "")],
        b'id,text,lang,{}\n1,a well," b,en",{}\n2,c,en,{}\n',
    ),
    "a field too few": (
        b"id,text,lang\n1,a\n",
        [(2, None, "2 fields, where the header has 3")],
        b"id,text,lang,{}\n1,a,,{}\n",
    ),
    "a quote in a quoted field": (
        b'id,text\n1,"he said "hi" to me"\n2,b\n',
        [(2, None, "a quoted field goes on behind its closing quote"), (3, "b", "")],
        None,
    ),
    "a byte of Latin-1 in a cell": (
        b"id,text\n1,caf\xe9\n2,b\n",
        [(2, None, "the text is not UTF-8 (byte 3)"), (3, "b", "")],
        b"id,text,{}\n1,caf\xe9,{}\n2,b,{}\n",
    ),
    "such a byte beside the text": (b"n,text\ncaf\xe9,b\n", [(2, "b", "")], b"n,text,{}\ncaf\xe9,b,{}\n"),
    "words that mean nothing elsewhere": (
        b"text\nnull\nNA\nnan\n404\n1e5\nTRUE\n",
        [(n, text, "") for n, text in enumerate(("null", "NA", "nan", "404", "1e5", "TRUE"), 2)],
        b"text,{}\nnull,{}\nNA,{}\nnan,{}\n404,{}\n1e5,{}\nTRUE,{}\n",
    ),
    "a cell of a megabyte": (b"text\n" + b"a" * 2**20 + b"\n", [(2, "a" * 2**20, "")], None),
    "a NUL": (b"text\na\0b\n", [(2, "a\0b", "")], b"text,{}\na\0b,{}\n"),
    "no rows": (b"id,text\n", [], b"id,text,{}\n"),
}


@pytest.mark.parametrize("case", CSV)
def test_a_csv_is_read_as_it_is_meant_and_written_as_it_was(case, tmp_path):
    content, expected, written = CSV[case]
    source = put(tmp_path, {"rows.csv": content})
    found = rows_of(source)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row[2].startswith(wanted[2])
        assert bool(row[2]) == bool(wanted[2])
    out = answered(source, "out.csv")
    if written is not None:
        dialect = tables.open_table(source).dialects[0]
        names, values = ("label,p,abstain", "Hate,0.5,True")
        texts = written.decode(dialect.encoding, "surrogateescape").split("{}")
        answers = [each.replace(",", dialect.delimiter) for each in (names, *[values] * (len(texts) - 2))]
        together = "".join(part for pair in zip(texts, [*answers, ""], strict=True) for part in pair)
        assert out.decode(dialect.encoding, "surrogateescape") == together
    # Whatever is written reads back row for row.
    again = put(tmp_path, {"again/rows.csv": out})
    assert len(rows_of(again)) == len(expected)
    assert {row[1] for row in expected} <= {row[1] for row in rows_of(again)} | {None}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty, without a header"),
        (b"\n\n", "is empty, without a header"),
        (b'id,text\n1,a\n2,"he said\n3,b\n4,c\n', r"line 3: a quote that opens in this row is not closed.*line 5"),
        (b'id,text\n1,"a\n', "line 2: a quote that opens in this row is not closed"),
        (b'id,text\n1,"a\n2,b\n3,"c"\n4,d\n', r"line 2: a quote that opens in this row is not closed.*line 4"),
        (b"id,text,pr\xe9nom\n1,a,b\n", r"line 1: not UTF-8 \(byte 10\), but perhaps \w+: name its encoding"),
        ("id,text\n1,a\n".encode("utf-16-le"), "line 1: holds zero bytes, as UTF-16 does: name its encoding"),
        ("id,text\n1,a\n".encode("utf-16")[:-1], "not UTF-16"),
        (b"id,words\n1,a\n", r"no column text \(there are: id, words\)"),
        (b"text,text\n1,a\n", "two columns are called text"),
        (b"id,text,label\n1,a,b\n", "has columns that would be added: label. Give those that are added a prefix"),
    ],
)
def test_what_is_no_csv_is_named(content, reason, tmp_path):
    source = put(tmp_path, {"rows.csv": content})
    with pytest.raises(UserError, match=reason) as error:
        list(tables.open_table(source, added=["label"]).batches())
    assert "rows.csv" in str(error.value)


def test_delimiter_and_encoding_can_be_named(tmp_path):
    source = put(tmp_path, {"rows.csv": b"id~text,x\n1~caf\xe9\n"})
    assert rows_of(source, text_column="text,x", delimiter="~", encoding="cp1252") == [(2, "caf\u00e9", "")]
    out = answered(source, "out.csv", text_column="text,x", delimiter="~", encoding="cp1252")
    assert out == b"id~text,x~label~p~abstain\n1~caf\xe9~Hate~0.5~True\n"
    assert tables.columns_of(source, delimiter="~") == (["id", "text,x"], "CSV, '~' between fields, UTF-8")
    with pytest.raises(UserError, match="a delimiter is one character"):
        tables.open_table(source, delimiter="ab")
    for name in ("klingon", "base64", "rot13"):
        with pytest.raises(UserError, match=f"there is no encoding {name}"):
            tables.open_table(source, encoding=name)


@pytest.mark.parametrize(("end", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files_are_read_and_written(end, module, tmp_path):
    for name, content in (("a.csv", b"text\na\n"), ("b.jsonl", b'{"text": "a"}\n'), ("c.tsv", b"n\ttext\n1\ta, b\n")):
        source = put(tmp_path, {name + end: module.compress(content)})
        assert [row[1][0] for row in rows_of(source)] == ["a"]
        out = answered(source, "out" + tables.whole_ending(source))
        assert module.decompress(out) == module.decompress(module.compress(module.decompress(out)))
        assert b"Hate" in module.decompress(out)
        damaged = put(tmp_path, {f"damaged/{name}{end}": module.compress(content)[:-6]})
        with pytest.raises(UserError, match=f"{name}{end}: its compression is damaged"):
            rows_of(damaged)


JSONL = {
    "a text": ('{"text": "a"}', "a", ""),
    "a number": ('{"text": 404}', "404", ""),
    "a number as it is written": ('{"text": 2.50}', "2.50", ""),
    "a long number": ('{"text": 12345678901234567890123}', "12345678901234567890123", ""),
    "null": ('{"text": null}', None, ""),
    "no such member": ('{"n": 1}', None, ""),
    "a list": ('{"text": ["a"]}', None, "the text is no text, but of the type list"),
    "an object": ('{"text": {"de": "a"}}', None, "the text is no text, but of the type dict"),
    "true": ('{"text": true}', None, "the text is no text, but of the type bool"),
    "half a character": ('{"text": "\\ud800"}', None, "the text holds a lone surrogate (at 0)"),
    "a character in two halves": ('{"text": "\\ud83d\\ude00"}', "\U0001f600", ""),
    "NaN": ('{"text": "a", "n": NaN}', None, "the line is not a JSON object"),
    "no JSON": ("{'text': 'a'}", None, "the line is not a JSON object"),
    "a list of texts": ('["a"]', None, "the line is not a JSON object"),
    "one that never ends": ("[" * 100_000, None, "the line is not a JSON object"),
}


@pytest.mark.parametrize("case", JSONL)
def test_lines_of_json(case, tmp_path):
    line, text, error = JSONL[case]
    source = put(tmp_path, {"rows.jsonl": f"{MARKED.decode()}{line}\n\n" + '{"text": "last", "x": 1.10}\r\n'})
    found = rows_of(source)
    assert (found[0][1], found[0][2][: len(error)], len(found)) == (text, error, 2)
    assert bool(found[0][2]) == bool(error)
    assert found[1] == (3, "last", "")
    first, last = answered(source, "out.jsonl").decode().splitlines()
    assert last == '{"text": "last", "x": 1.10, "label": "Hate", "p": 0.5, "abstain": true}'
    if "not a JSON object" in error:
        assert json.loads(first)["line"] == line
    else:
        assert first == line[:-1] + ', "label": "Hate", "p": 0.5, "abstain": true}'
        assert json.loads(first)["label"] == "Hate"


def test_names_that_only_a_later_line_has_are_seen_before_anything_is_written(tmp_path):
    source = put(tmp_path, {"rows.jsonl": '{"text": "a"}\n{"text": "b", "label": "mine"}\n'})
    with pytest.raises(UserError, match=r"rows.jsonl, line 2 has columns that would be added: label"):
        list(tables.open_table(source, added=list(ADDED)).batches())
    prefixed = tables.open_table(source, added=[f"model_{name}" for name in ADDED])
    assert sum(map(len, prefixed.batches())) == 2


RICH = pyarrow.table(
    {
        "text": pyarrow.array(["a", None, "b"]).dictionary_encode(),
        "id": pyarrow.array([2**63 - 1, None, 3], pyarrow.int64()),
        "tags": pyarrow.array([["x"], [], None]),
        "user": pyarrow.array([{"n": 1}, None, {"n": 2}]),
        "at": pyarrow.array([1, 2, 3], pyarrow.timestamp("ns", "Europe/Berlin")),
        "day": pyarrow.array([datetime.date(2024, 1, 5)] * 3),
        "money": pyarrow.array([decimal.Decimal("1.10")] * 3, pyarrow.decimal128(10, 2)),
        "nothing": pyarrow.nulls(3),
    }
).replace_schema_metadata({"theirs": "kept"})


def as_parquet(table: pyarrow.Table, **options) -> bytes:
    out = io.BytesIO()
    parquet.write_table(table, out, **options)
    return out.getvalue()


def test_parquet_keeps_its_types_and_what_it_says_of_itself(tmp_path):
    source = put(tmp_path, {"rows.parquet": as_parquet(RICH, row_group_size=2)})
    assert rows_of(source) == [(1, "a", ""), (2, None, ""), (3, "b", "")]
    found = parquet.read_table(io.BytesIO(answered(source, "out.parquet")))
    assert found.schema.metadata[b"theirs"] == b"kept"
    assert found.drop_columns(list(ADDED)).equals(RICH)
    assert found.schema.field("abstain").type == pyarrow.bool_()


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pyarrow.array([b"caf\xc3\xa9", b"caf\xe9"]), [("caf\u00e9", ""), (None, "the text is not UTF-8 (byte 3)")]),
        (pyarrow.array([404, None]), [("404", ""), (None, "")]),
        (pyarrow.array([404.5, float("nan")]), [("404.5", ""), (None, "")]),
        (pyarrow.array([decimal.Decimal("1.10")]), [("1.10", "")]),
        (pyarrow.array(["a"], pyarrow.large_string()), [("a", "")]),
        (pyarrow.array(["a"], pyarrow.string_view()), [("a", "")]),
        (pyarrow.nulls(1), [(None, "")]),
    ],
)
def test_what_is_a_text_in_parquet(values, texts, tmp_path):
    source = put(tmp_path, {"rows.parquet": as_parquet(pyarrow.table({"text": values}))})
    assert [row[1:] for row in rows_of(source)] == texts


@pytest.mark.parametrize(
    "values", [pyarrow.array([["a"]]), pyarrow.array([{"de": "a"}]), pyarrow.array([True]), RICH["at"]]
)
def test_a_column_of_another_type_is_refused(values, tmp_path):
    source = put(tmp_path, {"rows.parquet": as_parquet(pyarrow.table({"text": values}))})
    with pytest.raises(UserError, match=r"rows.parquet: the column text holds .*, and no text"):
        tables.open_table(source)


def test_a_folder_is_read_without_what_other_programs_leave_in_it(tmp_path, capsys):
    files = {"a.csv": "id,text\n1,a\n", "deep/b.csv": "id,text\n2,b\n", "empty.csv": "", "readme.md": "text\nno\n"}
    for name in (".ipynb_checkpoints/a.csv", "_temporary/0/a.csv", "__MACOSX/a.csv", ".a.csv", "_SUCCESS", "x/_a.csv"):
        files[name] = "id,text\n9,no\n"
    assert [row[1] for row in rows_of(put(tmp_path, files))] == ["a", "b"]
    said = capsys.readouterr().err
    assert "empty.csv is empty: left out" in said
    assert "readme.md" in said


def test_columns_are_those_of_all_files(tmp_path):
    source = put(tmp_path, {"a.csv": "id,text\n0001,a\n", "b.csv": "text;zip;id\nb;00501;0002\n"})
    assert answered(source, "x.csv").decode().splitlines() == [
        "id,text,zip,label,p,abstain",
        "0001,a,,Hate,0.5,True",
        "0002,b,00501,Hate,0.5,True",
    ]
    first = pyarrow.table({"id": [1], "text": ["a"], "kind": pyarrow.nulls(1)})
    second = pyarrow.table({"text": ["b"], "kind": ["x"], "more": [1.5]})
    source = put(tmp_path / "p", {"a.parquet": as_parquet(first), "b.parquet": as_parquet(second)})
    found = parquet.read_table(io.BytesIO(answered(source, "x.parquet"))).drop_columns(list(ADDED)).to_pylist()
    assert found == [
        {"id": 1, "text": "a", "kind": None, "more": None},
        {"id": None, "text": "b", "kind": "x", "more": 1.5},
    ]


def test_folders_that_say_a_column_are_one(tmp_path):
    files = {"lang=de/a.csv": "text\na\n", "lang=en/b.csv": "text\nb\n"}
    rows = list(csv.DictReader(io.StringIO(answered(put(tmp_path, files), "x.csv").decode())))
    assert [(row["text"], row["lang"]) for row in rows] == [("a", "de"), ("b", "en")]
    files = {"lang=de/a.jsonl": '{"text": "a"}\n', "lang=en/b.jsonl": '{"text": "b"}\n'}
    lines = answered(put(tmp_path / "j", files), "x.jsonl").decode().splitlines()
    assert [json.loads(line)["lang"] for line in lines] == ["de", "en"]
    content = as_parquet(pyarrow.table({"text": ["a"]}))
    source = put(tmp_path / "p", {"lang=de/a.parquet": content, "lang=en/b.parquet": content})
    found = parquet.read_table(io.BytesIO(answered(source, "x.parquet")))
    assert found["lang"].to_pylist() == ["de", "en"]
    for files in ({"label=Hate/a.csv": "text\na\n", "b.csv": "text\nb\n"},):
        with pytest.raises(UserError, match="has columns that would be added: label"):
            tables.open_table(put(tmp_path / "l", files), added=list(ADDED))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.csv": "id,text\n1,a\n", "b.csv": "id,body\n2,b\n"}, r"b.csv: no column text \(there are: id, body\)"),
        ({"a.csv": "text\na\n", "b.jsonl": "{}\n"}, r"files of several kinds \(.csv, .jsonl\)"),
        ({"a.md": "text", "b.txt": "text"}, "no such file, or a folder without files of .csv"),
        ({"a.csv": "", "b.csv": ""}, "all files are empty"),
        ({"a.csv": "n,n,text\n1,2,a\n", "b.csv": "n,text\n1,a\n"}, r"a.csv: two columns have one name \(n\)"),
        ({"a.csv": "n,text\n1,a\n", "b.csv": "n,n,text\n1,2,b\n"}, r"b.csv: two columns have one name \(n\)"),
        (
            {
                "a.parquet": as_parquet(pyarrow.table({"text": ["a"], "zip": [501]})),
                "b.parquet": as_parquet(pyarrow.table({"text": ["a"], "zip": ["00501"]})),
            },
            "b.parquet: the column zip is string, before it was int64: give all files one type",
        ),
        ({"a.parquet": b"PAR1", "b.parquet": b"x"}, "a.parquet: can't be read as Parquet"),
    ],
)
def test_files_that_do_not_go_together_are_named(files, reason, tmp_path):
    source = put(tmp_path, files)
    with pytest.raises(UserError, match=reason):
        tables.open_table(source)


def test_a_path_of_another_file_system(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/some/rows.csv", b"text\na\n")
    assert rows_of("memory://some/rows.csv") == [(2, "a", "")]
    assert rows_of("memory://some") == [(2, "a", "")]
    for source in ("memory://some/other.csv", "nonsense://x/rows.csv", str(tmp_path / "none.csv")):
        with pytest.raises(UserError, match=source):
            tables.open_table(source)


def test_content_is_told_by_what_is_in_the_files_and_not_by_when_or_where(tmp_path):
    one, two = put(tmp_path, {"a.csv": "text\na\n"}), put(tmp_path / "elsewhere", {"a.csv": "text\na\n"})
    first = tables.content_of(tables.open_table(one))
    assert first == tables.content_of(tables.open_table(two))
    put(tmp_path, {"a.csv": "text\nb\n"})
    assert first != tables.content_of(tables.open_table(one))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["rows.csv", "rows.tsv", "rows.jsonl", "rows.parquet", "rows.csv.gz"]))
def test_no_bytes_end_in_a_traceback(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("any")
    for beginning in (b"", b"text,id\n"):
        source = put(folder, {name: beginning + content})
        try:
            n_rows, out = len(rows_of(source)), answered(source, name)
        except UserError as error:
            reason = str(error)
        else:
            reason = name
            assert len(rows_of(put(folder, {f"out/{name}": out}))) == n_rows
        assert name in reason


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=6),
    delimiter=st.sampled_from(list(tables.DELIMITERS)),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_a_csv_writer_wrote_comes_back_cell_for_cell(tmp_path_factory, rows, delimiter, encoding, line_end):
    def written(some_rows) -> str:
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator=line_end)
        writer.writerows(some_rows)
        return out.getvalue()

    source = put(tmp_path_factory.mktemp("any"), {"rows.csv": written([("a", "text", "c"), *rows]).encode(encoding)})
    assert [row[1] for row in rows_of(source)] == [row[1] for row in rows]
    out = answered(source, "rows.csv").decode(encoding)
    found = list(csv.reader(io.StringIO(out, newline=""), delimiter=delimiter, strict=True))
    assert found[1:] == [[*row, "Hate", "0.5", "True"] for row in rows]


@pytest.mark.parametrize("encoding", ["euc_jp", "euc_kr", "big5", "cp949", "shift_jis", "gb18030", "cp1252", "ascii"])
@pytest.mark.parametrize("bad", [b"\xc3\x80", b"\xff", b"\x81", b"a\x80b"])
def test_bytes_that_an_encoding_does_not_know_come_back_as_they_were(encoding, bad, tmp_path):
    source = put(tmp_path, {"rows.csv": b"n,text\n" + bad + b",a day\n"})
    out = answered(source, "out.csv", encoding=encoding)
    assert out == b"n,text,label,p,abstain\n" + bad + b",a day,Hate,0.5,True\n"


def test_two_columns_of_one_name_are_not_mixed_up_in_a_folder(tmp_path):
    source = put(tmp_path, {"1.csv": "text,a,a\nhello,1,2\n", "2.csv": "text,b\nthanks,3\n"})
    with pytest.raises(UserError, match=r"1.csv: two columns have one name \(a\)"):
        tables.open_table(source)
    same = put(tmp_path / "same", {"1.csv": "text,a,a\nhello,1,2\n", "2.csv": "text,a,a\nthanks,3,4\n"})
    with pytest.raises(UserError, match=r"two columns have one name \(a\)"):
        tables.open_table(same)


def test_files_of_several_encodings_are_refused_before_anything_is_computed(tmp_path):
    source = put(tmp_path, {"1.csv": b"text\ncaf\xe9\n", "2.csv": MARKED + "text\n\u65e5\n".encode()})
    with pytest.raises(UserError, match=r"files of several encodings \(.*1.csv is CP1252, .*2.csv is UTF-8\)"):
        tables.open_table(source, encoding="cp1252")
    both = put(tmp_path / "both", {"1.csv": "text\na\n", "2.csv": MARKED + "text\n\u65e5\n".encode()})
    assert [row[1] for row in rows_of(both)] == ["a", "\u65e5"]


@pytest.mark.parametrize("options", [{"delimiter": "ab"}, {"delimiter": '"'}, {"delimiter": "\n"}, {"encoding": "a\0"}])
def test_what_can_not_be_a_delimiter_or_an_encoding_is_refused_where_columns_are_asked_for(options, tmp_path):
    source = put(tmp_path, {"rows.csv": "text\na\n"})
    for call in (tables.open_table, tables.columns_of):
        with pytest.raises(UserError, match=r"a delimiter is one character|there is no encoding"):
            call(source, **options)


@pytest.mark.parametrize("encoding", ["idna", "punycode", "undefined", "unicode_escape", "utf-32", "utf-7"])
def test_no_encoding_ends_in_a_traceback(encoding, tmp_path):
    source = put(tmp_path, {"rows.csv": b"text\ncaf\xc3\xa9 \\ud800 +AB\n"})
    with contextlib.suppress(UserError):
        rows_of(source, encoding=encoding)


@pytest.mark.parametrize("content", [MARKED, MARKED + b"\n", "\ufeff".encode("utf-16-le"), b"\n\r\n"])
def test_a_file_of_nothing_but_a_mark_is_empty(content, tmp_path):
    source = put(tmp_path, {"rows.csv": content})
    for call in (tables.open_table, tables.columns_of):
        with pytest.raises(UserError, match="is empty, without a header"):
            call(source)


def test_blank_lines_before_the_header_are_none(tmp_path):
    assert rows_of(put(tmp_path, {"rows.csv": "\n\nid;text\n1;a, b\n"})) == [(4, "a, b", "")]


def test_parquet_in_another_compression_is_refused_by_name(tmp_path):
    content = gzip.compress(as_parquet(pyarrow.table({"text": ["a"]})))
    with pytest.raises(UserError, match=r"rows.parquet.gz: a table is a file of"):
        tables.open_table(put(tmp_path, {"rows.parquet.gz": content}))
    assert tables.ending_of("out.parquet.gz") is None


def test_a_parquet_column_that_may_not_be_null_may_be_missing_in_another_file(tmp_path):
    fields = [pyarrow.field("text", pyarrow.string()), pyarrow.field("k", pyarrow.int64(), nullable=False)]
    first = pyarrow.table({"text": ["a"], "k": [1]}, schema=pyarrow.schema(fields))
    files = {"1.parquet": as_parquet(first), "2.parquet": as_parquet(pyarrow.table({"text": ["b"]}))}
    found = parquet.read_table(io.BytesIO(answered(put(tmp_path, files), "out.parquet")))
    assert found["k"].to_pylist() == [1, None]
    whole, part = pyarrow.table({"text": ["a"], "k": [2**53 + 1]}), pyarrow.table({"text": ["b"], "k": [0.5]})
    source = put(tmp_path / "wide", {"1.parquet": as_parquet(whole), "2.parquet": as_parquet(part)})
    with pytest.raises(UserError, match=r"1.parquet, rows 1 to 1: a number does not fit"):
        rows_of(source)


def test_content_knows_what_folders_say(tmp_path):
    german = tables.open_table(put(tmp_path / "a", {"lang=de/a.csv": "text\na\n", "b.csv": "text\nb\n"}))
    english = tables.open_table(put(tmp_path / "b", {"lang=en/a.csv": "text\na\n", "b.csv": "text\nb\n"}))
    assert tables.content_of(german) != tables.content_of(english)


PARQUET_OF_A_YEAR = as_parquet(pyarrow.table({"text": ["a"], "year": [2023]}))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"lang=de/a.csv": "text,lang\na,fr\n"}, r"a.csv: two columns have one name \(lang\)"),
        ({"text=de/a.csv": "text\na\n"}, r"a.csv: two columns have one name \(text\)"),
        ({"year=2024/a.parquet": PARQUET_OF_A_YEAR}, r"a.parquet: two columns have one name \(year\)"),
        ({"lang=de/a.jsonl": '{"text": "a", "lang": "fr"}\n'}, r"a.jsonl, line 1: its folder is called as a member is"),
    ],
)
def test_a_folder_that_says_a_column_which_its_file_has_is_refused(files, reason, tmp_path):
    put(tmp_path, files)
    with pytest.raises(UserError, match=reason):
        list(tables.open_table(str(tmp_path)).batches())


def test_folders_say_columns_as_hive_and_spark_write_them(tmp_path):
    put(tmp_path, {"_y=2024/d=a%20b/a.csv": "text\na\n", "_y=__HIVE_DEFAULT_PARTITION__/d=c/b.csv": "text\nb\n"})
    rows = list(csv.DictReader(io.StringIO(answered(str(tmp_path), "x.csv").decode())))
    assert sorted((row["text"], row["_y"], row["d"]) for row in rows) == [("a", "2024", "a b"), ("b", "", "c")]


def test_blank_lines_around_excels_first_line_are_none(tmp_path):
    source = put(tmp_path, {"rows.csv": b"\r\nsep=;\r\n\r\nid;text\r\n1;a\r\n"})
    assert rows_of(source) == [(5, "a", "")]
    assert answered(source, "x.csv") == b"sep=;\r\nid;text;label;p;abstain\r\n1;a;Hate;0.5;True\r\n"


def test_a_line_that_is_no_json_spoils_no_other_in_what_is_written(tmp_path):
    out = answered(put(tmp_path, {"rows.jsonl": b'caf\xe9\n{"text": "b"}\n'}), "x.jsonl")
    first, second = [json.loads(line) for line in out.decode("utf-8").splitlines()]
    assert (first["line"], second["text"]) == ("caf\\xe9", "b")
    assert json.dumps([first, second], ensure_ascii=False).encode()  # no half a character


@pytest.mark.parametrize("cell", ['"he said "hi" to me"', '"he said \\"hi\\""'])
def test_a_row_whose_quotes_go_wrong_keeps_every_character(cell, tmp_path):
    source = put(tmp_path, {"rows.csv": f"id,text\n1,{cell}\n2,b\n"})
    assert [row[1] for row in rows_of(source)] == [None, "b"]
    rows = list(csv.reader(io.StringIO(answered(source, "x.csv").decode(), newline=""), strict=True))
    assert rows[1][:2] == ["1", cell]


def test_a_quote_that_opens_in_the_header_prints_no_rows(tmp_path):
    source = put(tmp_path, {"rows.csv": 'id,"text\n1,some words\n2,other words\n'})
    for call in (tables.open_table, tables.columns_of):
        with pytest.raises(UserError, match=r"line 1: a quote that opens in the header") as error:
            call(source)
        assert "words" not in str(error.value)


def test_what_an_encoding_can_not_write_is_refused_before_anything_is_computed(tmp_path):
    source = put(tmp_path, {"rows.csv": b"text\ncaf\xe9\n"})
    with pytest.raises(UserError, match=r"'.*_label' can't be written in CP1252"):
        tables.open_table(source, encoding="cp1252", added=["\u6f22_label"])


def test_lines_of_json_are_utf_8(tmp_path):
    source = put(tmp_path, {"rows.jsonl": '{"text": "a"}\n'.encode("utf-16")})
    with pytest.raises(UserError, match="lines of JSON are UTF-8, and this file is UTF-16"):
        tables.open_table(source)
    with pytest.raises(UserError, match="lines of JSON are UTF-8, not latin-1"):
        tables.open_table(put(tmp_path / "b", {"rows.jsonl": "{}"}), encoding="latin-1")
    assert rows_of(put(tmp_path / "c", {"rows.jsonl": '{"text": "a"}'}), encoding="utf-8") == [(1, "a", "")]


def test_names_that_no_page_can_show_are_not_offered(tmp_path):
    source = put(tmp_path, {"rows.jsonl": b'{"caf\xe9": 1, "\\ud800": 2, "a b": 3, "text": "x"}\n'})
    assert tables.columns_of(source)[0] == ["a b", "text"]


def test_a_string_of_parquet_that_is_no_utf_8_spoils_no_other_row(tmp_path):
    broken = pyarrow.array([b"ok", b"caf\xe9"]).view(pyarrow.string())
    source = put(tmp_path, {"rows.parquet": as_parquet(pyarrow.table({"text": broken}))})
    assert rows_of(source) == [(1, "ok", ""), (2, None, "the text is not UTF-8 (byte 3)")]
    short = pyarrow.table({"text": pyarrow.array([0.1, None], pyarrow.float32())})
    assert [row[1] for row in rows_of(put(tmp_path / "f", {"rows.parquet": as_parquet(short)}))] == ["0.1", None]


@pytest.mark.parametrize(
    "source", ["s3://no-such-bucket-of-ours/x.csv", "github://x.csv", "ftp://127.0.0.1:1/x.csv", "a\0b.csv"]
)
def test_a_path_that_leads_nowhere_is_one_line(source, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError) as error:
        tables.open_table(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.csv", ".csv"),
        ("A.CSV.GZ", ".csv"),
        ("csv", None),
        ("a.parquet.gz", None),
        ("a.b.jsonl", ".jsonl"),
        ("a.", None),
    ],
)
def test_endings(name, ending):
    assert tables.ending_of(name) == ending
