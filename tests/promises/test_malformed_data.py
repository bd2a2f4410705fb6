"""Malformed training data, texts to measure on, tokenizers and recipes: one line, nothing left."""

import gzip
import json
import os
import shutil
from datetime import date, datetime
from functools import partial
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, IterableDataset, Json, List
from malformed import refusal
from tiny import VOCAB_SIZE, tiny_tokenizer
from typer.testing import CliRunner

from retrofit import cli
from retrofit.data import sources
from retrofit.data.rows import RowCheck, checked_stream
from retrofit.data.sources import load_sources
from retrofit.measure import cut_windows, prepended_token, read_documents
from retrofit.models.loading import load_tokenizer
from retrofit.recipe import Data, Model, load_recipe
from retrofit.training.check import _preview
from retrofit.utils.errors import UserError

SENTENCE = "the sink token draws all attention to the first token of the text"
TEXTS = [{"text": f"{SENTENCE} {number}"} for number in range(30)]
PAIRS = [{"prompt": f"{number}: ", "completion": SENTENCE} for number in range(30)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": SENTENCE}]
CHATS = [{"messages": TURNS}] * 30
SHAREGPT = [{"from": "user", "value": "hi"}, {"from": "assistant", "value": SENTENCE}]
LINES = "".join(json.dumps(row) + "\n" for row in TEXTS)
GENERATION = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"  # noqa: E501

# The same bytes whenever the tests are collected: they stand in names of cases.
compressed = partial(gzip.compress, mtime=0)


def lines(*rows) -> bytes:
    return "".join(
        (row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows
    ).encode()


class Folder:
    """A folder with a tiny base, and a recipe to train on it."""

    def __init__(self, path: Path, base: Path):
        self.path, self.base = path, base

    def file(self, name: str, content: bytes) -> Path:
        path = self.path / name
        path.write_bytes(content)
        return path

    def own_base(self) -> Path:
        """A copy of the base that may be damaged."""
        self.base = Path(shutil.copytree(self.base, self.path / "base"))
        return self.base

    def recipe(self, source: str | Path | dict, **sections) -> Path:
        source = source if isinstance(source, dict) else {"path": str(source)}
        settings = {
            "output_dir": str(self.path / "run"),
            "model": {"base": str(self.base)},
            "data": {"sources": [source], "sequence_length": 64, "packing": False},
            "train": {
                "max_steps": 1,
                "report_to": [],
                "gradient_checkpointing": "none",
                "learning_rate": 1e-3,
            },
        }
        for name, section in sections.items():
            settings[name] = settings.get(name, {}) | section
        path = self.path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    def train(self, source, **sections) -> str:
        return refusal("train", self.recipe(source, **sections), leaves_alone=self.path)

    def trains(self, source, **sections) -> Path:
        result = CliRunner().invoke(cli.app, ["train", str(self.recipe(source, **sections))])
        assert result.exit_code == 0, result.exception or result.output
        return self.path / "run"


@pytest.fixture
def folder(tmp_path, tiny_base):
    return Folder(tmp_path, tiny_base("llama"))


BAD_LINES = {
    "null": (lines(*TEXTS, {"text": None}), "line 31: text is null, not text"),
    "a number": (lines(*TEXTS, {"text": 5}), "line 31: text is a number, not text"),
    "a float": (lines(*TEXTS, {"text": 0.5}), "line 31: text is a number"),
    "a truth value": (lines(*TEXTS, {"text": True}), "line 31: text is a truth value"),
    "a list": (lines(*TEXTS, {"text": ["a"]}), "line 31: text is a list, not text"),
    "an object": (lines(*TEXTS, {"text": {"a": 1}}), "line 31: text is an object, not text"),
    "missing": (lines(*TEXTS, {"body": "x"}), "line 31: no text"),
    "missing beside others": (lines(*TEXTS, {"meta": 1}), "line 31: no text"),
    "an empty object": (lines(*TEXTS, {}), "line 31: no text"),
    "null in the first line": (lines({"text": None}, *TEXTS), "line 1: text is null"),
    "all numbers": (lines({"text": 1}, {"text": 2}), "line 1: text is a number"),
    "all null": (lines({"text": None}, {"text": None}), "line 1: text is null"),
    "after blank lines": (lines("", *TEXTS, "", {"text": None}), "line 33: text is null"),
    "a line that is a number": (lines(*TEXTS, "3"), "line 31: a number, not an object"),
    "a line that is text": (lines(*TEXTS, '"abc"'), "line 31: text, not an object"),
    "a line that is a list": (lines(*TEXTS, "[1]"), "line 31: a list, not an object"),
    "a line that is null": (lines(*TEXTS, "null"), "line 31: null, not an object"),
    "a line cut off": (lines(*TEXTS, '{"text": "a'), "line 31 is not JSON"),
    "single quotes": (lines(*TEXTS, "{'text': 'a'}"), "line 31 is not JSON"),
    "two objects in a line": (lines(*TEXTS, '{"text": "a"}{"text": "b"}'), "line 31 is not JSON"),
    "a tab in text": (lines(*TEXTS, '{"text": "a\tb"}'), "line 31 is not JSON"),
    "half a surrogate pair": (
        lines(*TEXTS, '{"text": "\\ud800 x"}'),
        "line 31 escapes half a character",
    ),
    "deep": (lines(*TEXTS, '{"text": ' + "[" * 5000 + "]" * 5000 + "}"), "line 31"),
    "half a character": (LINES.encode() + b'{"text": "\xe2\x82"}\n', "line 31 is not UTF-8"),
    "Latin-1": ((LINES + '{"text": "café"}\n').encode("latin-1"), "line 31 is not UTF-8"),
    "UTF-16": (LINES.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": (LINES.encode("utf-16-le"), "line 1 holds a NUL byte, as UTF-16 does"),
    "UTF-16, big end first": (b"\xfe\xff" + LINES.encode("utf-16-be"), "it is UTF-16"),
    "a NUL": (LINES.encode() + b'{"text": "a\x00"}\n', "line 31 holds a NUL byte"),
    "nothing": (b"", "data.jsonl"),
    "blank lines alone": (b"\n\n\n", "data.jsonl"),
    "blank texts alone": (lines({"text": ""}, {"text": " \n"}), "holds nothing but blanks"),
    "no known column": (lines({"body": "x"}), "has the columns body; expected text"),
    "binary": (bytes(range(256)) * 8, "data.jsonl"),
}


@pytest.mark.parametrize(("content", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(folder, content, message):
    assert message in folder.train(folder.file("data.jsonl", content))


@pytest.mark.parametrize("name", ["null", "a number", "missing", "a line cut off", "Latin-1"])
def test_a_bad_line_of_a_streamed_file_is_named_before_training(folder, name):
    content, message = BAD_LINES[name]
    path = folder.file("data.jsonl", content)
    assert message in folder.train(path, data={"streaming": True})


@pytest.mark.parametrize("name", ["null", "a number", "an object", "Latin-1"])
def test_a_bad_line_is_named_by_the_preflight_too(folder, name):
    content, message = BAD_LINES[name]
    recipe = folder.recipe(folder.file("data.jsonl", content))
    assert message in refusal("check", recipe, leaves_alone=folder.path)


@pytest.mark.parametrize("bad", [5, {"a": 1}, None], ids=["a number", "an object", "null"])
def test_a_value_past_the_part_that_datasets_reads_the_types_from_is_named(tmp_path, bad):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(*[{"text": "x" * 1_200_000}] * 10, {"text": bad}))
    with pytest.raises(UserError, match="line 11: text is"):
        load_sources(sources_of(path), tiny_tokenizer())


def sources_of(path: Path, **settings) -> Data:
    return Data.model_validate({"sources": [{"path": str(path)}], **settings})


def test_a_library_prints_no_second_error(folder, capfd):
    folder.train(folder.file("data.jsonl", lines(*TEXTS, '{"text": "a')))
    assert not capfd.readouterr().err.strip()


BAD_PAIRS = {
    "null prompt": ({"prompt": None, "completion": "x"}, "line 31: prompt is null"),
    "null completion": ({"prompt": "x", "completion": None}, "line 31: completion is null"),
    "number": ({"prompt": 3, "completion": "x"}, "line 31: prompt is a number"),
    "no completion": ({"prompt": "x"}, "line 31: no completion"),
    "no prompt": ({"completion": "x"}, "line 31: no prompt"),
    "messages among texts": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt is a list"),
}


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_bad_pair_is_named(folder, row, message):
    assert message in folder.train(folder.file("pairs.jsonl", lines(*PAIRS, row)))


def test_completions_that_are_all_blank_are_refused(folder):
    path = folder.file("pairs.jsonl", lines(*[{"prompt": "x", "completion": " "}] * 9))
    assert "holds nothing but blanks" in folder.train(path)


BAD_CHATS = {
    "no message": ([], "line 31: messages is empty"),
    "null": (None, "line 31: messages is null, not a list"),
    "text": ("hi", "line 31: messages is text, not a list"),
    "one object": (TURNS[0], "line 31: messages is an object, not a list"),
    "a message that is text": ([*TURNS, "hi"], "message 3 of messages is text, not an object"),
    "no role": ([{"content": "x"}], "message 1 of messages has no role"),
    "null role": ([{"role": None, "content": "x"}], "message 1 of messages has no role"),
    "a number for a role": ([{"role": 1, "content": "x"}], "has a number for a role"),
    "no content": ([{"role": "user"}], "its content is null"),
    "null content": ([TURNS[0], {"role": "assistant", "content": None}], "message 2 of messages"),
    "list content": (
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "its content is a list, not text",
    ),
    "object content": ([{"role": "user", "content": {"text": "x"}}], "its content is an object"),
    "a number for content": ([{"role": "user", "content": 7}], "its content is a number"),
    "a role with a value": ([{"role": "user", "value": "x"}], "message 1 of messages mixes two"),
    "from with a content": ([{"from": "user", "content": "x"}], "message 1 of messages mixes two"),
    "a crossed message among others": (
        [*TURNS, {"role": "a", "value": "x"}],
        "message 3 of messages",
    ),
}


@pytest.mark.parametrize(("messages", "message"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_chat_is_named(folder, messages, message):
    path = folder.file("chats.jsonl", lines(*CHATS, {"messages": messages}))
    found = folder.train(path)
    assert message in found and "line 31" in found


BAD_BESIDE = {
    "text for settings": ({"chat_template_kwargs": "x"}, "chat_template_kwargs is text, not"),
    "a list for settings": ({"chat_template_kwargs": [1]}, "chat_template_kwargs is a list, not"),
    "tokenize": (
        {"chat_template_kwargs": {"tokenize": False}},
        "kwargs sets tokenize",
    ),
    "tools that are no JSON": ({"tools": "[{"}, "tools is text that is not JSON"),
    "an object for tools": ({"tools": {"type": "function"}}, "tools is an object, not a list"),
    "a number for tools": ({"tools": 3}, "tools is a number, not a list"),
    "a number among tools": ({"tools": [{"type": "function"}, 3]}, "tools holds a number, not an"),
    "a number too large": (
        {"messages": [*TURNS, {"role": "tool", "content": "x", "number": 10**40}]},
        "holds a number or a nesting",
    ),
}


@pytest.mark.parametrize(("beside", "message"), BAD_BESIDE.values(), ids=BAD_BESIDE)
def test_what_stands_beside_a_chat_is_named_and_not_the_template(folder, beside, message):
    row = {"messages": TURNS} | beside
    found = folder.train(folder.file("chats.jsonl", lines(*CHATS, row)))
    assert "line 31: " in found and message in found and "template of the base" not in found


@pytest.mark.parametrize("name", ["null", "no message", "no role", "list content"])
def test_a_bad_conversation_of_sharegpt_is_named(folder, name):
    messages, _ = BAD_CHATS[name]
    rows = [*[{"conversations": SHAREGPT}] * 30, {"conversations": messages}]
    assert "line 31" in folder.train(folder.file("chats.jsonl", lines(*rows)))


def test_the_row_in_which_a_chat_template_raises_is_named(folder):
    own_template(folder, "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception("
                 "'turns must alternate') }}{% endif %}{{ m.content }}{% endfor %}")  # fmt: skip
    rows = [*CHATS, {"messages": [{"role": "user", "content": "no"}]}]
    found = folder.train(folder.file("chats.jsonl", lines(*rows)))
    assert "line 31: the chat template" in found and "turns must alternate" in found


def own_template(folder: Folder, template: str | None) -> None:
    base = folder.own_base()
    (base / "chat_template.jinja").unlink()
    if template is not None:
        (base / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the base's tokenizer has none"),
        ("{% for m in messages %}", "line 1: the chat template"),
        ("{{ messages[7].content }}", "line 1: the chat template"),
        ("{{ messages.x.y }}", "line 1: the chat template"),
        ("{{ messages | nothing }}", "line 1: the chat template"),
        ("{{ 1 / 0 }}", "line 1: the chat template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 1: the chat template"),
        ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "line 1: the chat template"),
        ("{{ messages[0].content + 3 }}", "line 1: the chat template"),
        ("  ", "makes it empty"),
    ],
    ids=[
        "none",
        "not closed",
        "out of range",
        "undefined",
        "no filter",
        "by 0",
        "a macro in itself",
        "deep",
        "types",
        "empty",
    ],
)
def test_a_chat_template_that_cannot_be_used_is_one_line(folder, template, message):
    own_template(folder, template)
    assert message in folder.train(folder.file("chats.jsonl", lines(*CHATS)))


@pytest.mark.parametrize(
    ("template", "rows", "message"),
    [
        (GENERATION, TEXTS, "holds no chats"),
        (GENERATION, PAIRS, "holds no chats"),
        ("{{ messages[0].content }}", CHATS, "does not mark the assistant's turns"),
        (GENERATION, [*CHATS, {"messages": TURNS[:1]}], "line 31: no turn of the assistant"),
        (
            GENERATION.replace("'assistant'", "'bot'"),
            CHATS,
            "the chat template marks nothing in a row",
        ),
    ],
    ids=["text", "pairs", "no marks", "a chat without an answer", "marks of somebody else"],
)
def test_the_assistants_loss_without_an_assistant_is_refused(folder, template, rows, message):
    own_template(folder, template)
    path = folder.file("data.jsonl", lines(*rows))
    assert message in folder.train(path, data={"assistant_only_loss": True})


def table(**columns) -> Dataset:
    return Dataset.from_dict(columns)


BAD_PARQUET = {
    "null": (table(text=["a"] * 30 + [None]), "row 31: text is null"),
    "numbers": (table(text=[1, 2]), "row 1: text is a number"),
    "lists": (table(text=[["a"]]), "row 1: text is a list"),
    "null completion": (table(prompt=["a", "b"], completion=["a", None]), "row 2: completion is"),
    "empty messages": (table(messages=[TURNS, []]), "row 2: messages is empty"),
    "null messages": (table(messages=[TURNS, None]), "row 2: messages is null"),
    "no rows": (table(text=["a"]).select([]), "is empty"),
    "blank": (table(text=["", " "]), "holds nothing but blanks"),
}


@pytest.mark.parametrize(("rows", "message"), BAD_PARQUET.values(), ids=BAD_PARQUET)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_bad_row_of_parquet_is_named(tmp_path, rows, message, streaming):
    rows.to_parquet(str(tmp_path / "data.parquet"))
    data = sources_of(tmp_path / "data.parquet", streaming=streaming)
    with pytest.raises(UserError, match=message):
        load_sources(data, tiny_tokenizer())


def test_half_a_character_in_parquet_is_one_line(tmp_path):
    offsets, content = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xe2")
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, content])
    pq.write_table(pa.table({"text": column}), tmp_path / "data.parquet")
    with pytest.raises(UserError, match="data.parquet"):
        load_sources(sources_of(tmp_path / "data.parquet"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b"[1, 2]", "row 1: a number, not an object"),
        ("data.json", b'[null, {"text": "a"}]', "row 1: null, not an object"),
        ("data.json", b'[{"text": "a"}, null]', "row 2: null, not an object"),
        ("data.json", b'[{"text": "a"}, [1]]', "row 2: a list, not an object"),
        ("data.json", b"null", "row 1: null, not an object"),
        ("data.json", b"[]", "is empty"),
        ("data.json", b'[{"text": "a"}] x', "it is not JSON"),
        ("data.json", b'[{"text": "a"}, {"text": "\\ud800 x"}]', "row 2 escapes half a character"),
        ("data.json", b"[" * 5000, "it is not JSON"),
        ("data.json", '[{"text": "a"}]'.encode("utf-16-le"), "line 1 holds a NUL byte"),
        ("data.txt", "a\nb".encode("utf-16-le"), "line 1 holds a NUL byte, as UTF-16 does"),
        ("data.txt", b"a\nb\0", "line 2 holds a NUL byte"),
        ("data.json", b'[{"text": "a"}, {"text": null}]', "row 2: text is null"),
        ("data.json", b'[{"text": "a"}, {"text": 3}]', "row 2: text is a number"),
        ("data.json", b'[{"text": "a"}, ', "it is not JSON"),
        ("data.json", b'{"text": "a"}\n{"text": null}\n', "line 2: text is null"),
        ("data.json", '[{"text": "é"}]'.encode("latin-1"), "line 1 is not UTF-8"),
        ("data.json", '[{"text": "é"}]'.encode("utf-16"), "it is UTF-16"),
        ("data.txt", "é".encode("latin-1"), "line 1 is not UTF-8"),
        ("data.txt", b"a\nb\n\xe2\x82", "line 3 is not UTF-8"),
        ("data.txt", "a".encode("utf-16"), "it is UTF-16"),
        ("data.txt", b"", "data.txt"),
        ("data.txt", b" \n\t\n", "holds nothing but blanks"),
        ("data.parquet", b"PAR1 and so on", "cannot read"),
        ("data.parquet", b"", "cannot read"),
        ("data.jsonl.gz", b"no gzip", "no whole gzip file"),
        ("data.jsonl.gz", compressed(LINES.encode())[:-20], "no whole gzip file"),
        ("data.jsonl.gz", compressed(lines(*TEXTS, {"text": 1})), "line 31: text is a number"),
        ("data.csv", b"text\na\n", "of a kind that is not read; .jsonl, .json, .txt"),
        ("data.tsv", b"text\na\n", "of a kind that is not read"),
        ("data.zip", b"PK", "of a kind that is not read"),
        ("data.jsonl.zst", b"x", "of a kind that is not read"),
        ("data.jsonl.xz", b"x", "of a kind that is not read"),
        ("data.parquet.gz", b"x", "of a kind that is not read"),
        ("data", b"x", "of a kind that is not read"),
        ("DATA.MD", b"x", "of a kind that is not read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(folder, name, content, message):
    assert message in folder.train(folder.file(name, content))


@pytest.mark.parametrize(
    "name",
    ["no.jsonl", "no.JSONL", "no.jsonl.gz", "no.csv", "no.tsv", "no.zip", "a/b/c", "./x", "~/no x"],
)
def test_a_file_that_is_not_there_is_no_hub_id(folder, name):
    assert f"no file {name}" in folder.train(name)


def test_a_folder_is_no_data(folder):
    assert "is a folder; name a file" in folder.train(folder.path)


def test_a_pipe_is_no_data(folder):
    os.mkfifo(folder.path / "data.jsonl")
    assert "no file" in folder.train(folder.path / "data.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("data.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("data.jsonl", lines(*TEXTS, {"text": "x", "more": 1})),
        ("data.jsonl", lines(*TEXTS, {"text": ""})),
        ("DATA.JSONL", LINES.encode()),
        ("data.Json", LINES.encode()),
        ("data.json", json.dumps(TEXTS).encode()),
        ("data.json", json.dumps(TEXTS, indent=1).encode()),
        ("data.jsonl.gz", compressed(LINES.encode())),
        ("data.JSONL.GZ", compressed(b"\xef\xbb\xbf" + LINES.encode())),
        ("data.json.gz", compressed(json.dumps(TEXTS).encode())),
        ("data.txt", b"\xef\xbb\xbf" + LINES.encode()),
        ("data.TXT", LINES.encode()),
        ("data.txt.gz", compressed(LINES.encode())),
        ("pairs.jsonl", lines(*PAIRS, {"prompt": "", "completion": "x"})),
        ("a::b.jsonl", LINES.encode()),
        ("zip::a.txt", LINES.encode()),
        ("data.json", json.dumps([row["text"] for row in TEXTS]).encode()),
        ("data.json", "\n".join(json.dumps(row, indent=1) for row in TEXTS).encode()),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_data_is_accepted_as_people_have_it(tmp_path, name, content, streaming):
    (tmp_path / name).write_bytes(content)
    data = sources_of(tmp_path / name, streaming=streaming)
    (source,) = load_sources(data, tiny_tokenizer())
    rows = [row.get("text", row.get("completion")) for row in source.rows]
    assert len(rows) == (1 if ".txt" in name.lower() else rows.count("") + 30 + rows.count("x"))
    assert not any(row.startswith("\ufeff") for row in rows)


DATES = {
    "text": [{"text": "2024-01-01"}],
    "completion": [{"prompt": "when?", "completion": "2024-01-01T10:00:00"}],
    "messages": [{"messages": [{"role": "user", "content": "2024-01-01"}]}],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("column", DATES)
def test_dates_are_accepted_as_the_text_that_they_are(tmp_path, column, streaming):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(*DATES[column] * 3))
    (source,) = load_sources(sources_of(path, streaming=streaming), tiny_tokenizer())
    assert [row[column] for row in source.rows] == [DATES[column][0][column]] * 3


@pytest.mark.parametrize("last", [{"text": "x"}, {"text": "x", "new": 1}, {"text": "x", "id": "x"}])
def test_what_comes_late_in_a_file_is_accepted_where_it_is_not_read(tmp_path, last):
    path = tmp_path / "data.jsonl"
    early = [{"text": "2024-01-01", "id": 1}] * 3 + [{"text": "x" * 12_000_000, "id": 1}]
    path.write_bytes(lines(*early, last))
    (source,) = load_sources(sources_of(path), tiny_tokenizer())
    assert source.rows["text"][0] == "2024-01-01" and source.rows["text"][-1] == "x"


def parquet(rows: list[dict], path: Path) -> None:
    Dataset.from_list(rows).to_parquet(str(path))


WRITTEN = {
    ".jsonl": lambda rows, path: path.write_bytes(lines(*rows)),
    ".jsonl.gz": lambda rows, path: path.write_bytes(compressed(lines(*rows))),
    ".json": lambda rows, path: path.write_text(json.dumps(rows)),
    ".txt": lambda rows, path: path.write_text(rows[0]["text"]),
    ".parquet": parquet,
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_that_is_written_over_in_the_same_moment_is_read_anew(tmp_path, kind, streaming):
    path = tmp_path / f"data{kind}"
    for text in ("a text of before", "a text of thence"):
        WRITTEN[kind]([{"text": text}], path)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        (source,) = load_sources(sources_of(path, streaming=streaming), tiny_tokenizer())
        assert [row["text"] for row in source.rows] == [text]


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(tmp_path, monkeypatch):
    path, seen = tmp_path / "data.jsonl", str(uuid4())  # what no run before has kept
    path.write_bytes(lines({"text": seen}))
    check = sources.check_file

    def and_then_it_changes(*arguments):
        content = check(*arguments)
        path.write_bytes(lines({"text": "put there"}))
        return content

    monkeypatch.setattr(sources, "check_file", and_then_it_changes)
    with pytest.raises(UserError, match="has changed while it was read"):
        load_sources(sources_of(path), tiny_tokenizer())
    monkeypatch.undo()
    path.write_bytes(lines({"text": seen}))
    (source,) = load_sources(sources_of(path), tiny_tokenizer())
    assert source.rows["text"][:] == [seen]


MIXED_CHATS = {
    "ShareGPT last": [{"messages": TURNS}] * 8 + [{"messages": SHAREGPT}],
    "ShareGPT first": [{"messages": SHAREGPT}] * 8 + [{"messages": TURNS}],
    "in one chat": [{"messages": [TURNS[0], SHAREGPT[1]]}],
    "in a pair": [{"prompt": TURNS[:1], "completion": SHAREGPT[1:]}],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("rows", MIXED_CHATS.values(), ids=MIXED_CHATS)
def test_mixed_spellings_of_chats_are_accepted_and_no_turn_is_empty(
    tmp_path, rows, suffix, streaming
):
    WRITTEN[suffix](rows, tmp_path / f"chats{suffix}")
    data = sources_of(tmp_path / f"chats{suffix}", streaming=streaming)
    (source,) = load_sources(data, tiny_tokenizer())
    for row in source.rows:
        messages = row.get("messages") or row["prompt"] + row["completion"]
        said = [{key: message[key] for key in ("role", "content")} for message in messages]
        assert said == TURNS


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_on_the_hub_are_accepted_in_both_spellings(monkeypatch, column, streaming):
    chats = Dataset.from_list([{column: TURNS, "id": 1}, {column: SHAREGPT, "id": 2}])
    rows = chats.to_iterable_dataset() if streaming else chats
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *_, **__: rows)
    (source,) = load_sources(sources_of(Path("some/chats"), streaming=streaming), tiny_tokenizer())
    for row in source.rows:
        assert set(row) == {"messages", "tools", "chat_template_kwargs"}
        assert [
            {key: turn[key] for key in ("role", "content")} for turn in row["messages"]
        ] == TURNS


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_bad_chat_on_the_hub_is_named(monkeypatch, streaming):
    chats = Dataset.from_list([{"messages": TURNS}, {"messages": []}])
    rows = chats.to_iterable_dataset() if streaming else chats
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(UserError, match="some/chats, row 2: messages is empty"):
        (source,) = load_sources(
            sources_of(Path("some/chats"), streaming=streaming), tiny_tokenizer()
        )
        list(source.rows)


def test_what_only_some_rows_set_for_the_chat_template_is_accepted(folder):
    own_template(folder, "{% if much is defined %}much{% endif %}{{ messages[0].content }}")
    none, much = ({"messages": TURNS, "chat_template_kwargs": x} for x in (None, {"much": None}))
    rows = [*CHATS, much, none]
    path = folder.file("chats.jsonl", lines(*rows))
    (source,) = load_sources(sources_of(path), load_tokenizer(Model(base=str(folder.base))))
    settings = source.rows["chat_template_kwargs"]
    assert settings[0] == settings[31] == {} and settings[30] == {"much": None}
    folder.trains(path)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_what_is_shown_of_a_chat_is_what_the_template_makes_of_it(folder, streaming):
    own_template(folder, "{{ mode.upper() }} {{ tools[0].name }} {{ messages[0].content }}")
    row = {"messages": TURNS, "tools": [{"name": "f"}], "chat_template_kwargs": {"mode": "fast"}}
    path = folder.file("chats.jsonl", lines(*[row] * 30))
    tokenizer = load_tokenizer(Model(base=str(folder.base)))
    (source,) = load_sources(sources_of(path, streaming=streaming), tokenizer)
    assert _preview(source.rows, tokenizer).endswith("'FAST f hi'...")


def test_a_column_of_text_is_read_beside_chats_if_it_is_named(tmp_path):
    path = tmp_path / "both.jsonl"
    path.write_bytes(lines(*[{"messages": TURNS, "text": "plain"}] * 3))
    for field, name in ((None, "messages"), ("text", "text")):
        data = Data.model_validate({"sources": [{"path": str(path), "text_field": field}]})
        (source,) = load_sources(data, tiny_tokenizer())
        assert name in source.rows.column_names


def test_a_column_of_chats_that_is_named_as_text_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(*[{"prompt": TURNS[:1], "completion": TURNS[1:]}] * 3))
    data = Data.model_validate({"sources": [{"path": str(path), "text_field": "prompt"}]})
    with pytest.raises(UserError, match="line 1: prompt is a list, not text"):
        load_sources(data, tiny_tokenizer())


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_dates_beside_the_words_of_a_chat_are_accepted(tmp_path, streaming):
    message = TURNS[0] | {"sent": datetime(2024, 1, 2), "read": date(2024, 1, 2)}
    parquet([{"messages": [message]}], tmp_path / "chats.parquet")
    data = sources_of(tmp_path / "chats.parquet", streaming=streaming)
    (source,) = load_sources(data, tiny_tokenizer())
    assert [row["messages"][0]["content"] for row in source.rows] == ["hi"]


def test_messages_that_datasets_has_stored_as_json_are_accepted(tmp_path):
    features = Features({"messages": List(Json())})
    rows = Dataset.from_list([{"messages": TURNS}, {"messages": SHAREGPT}], features=features)
    rows.to_parquet(str(tmp_path / "chats.parquet"))
    (source,) = load_sources(sources_of(tmp_path / "chats.parquet"), tiny_tokenizer())
    assert list(source.rows["messages"]) == [TURNS, TURNS]


def test_the_numbers_of_a_chat_are_kept_as_they_are(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": 3.141592653589793, "none": None}}}
    said = [*TURNS[:1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (tmp_path / "chats.jsonl").write_bytes(lines({"messages": said, "tools": [{"a": 1}]}))
    (source,) = load_sources(sources_of(tmp_path / "chats.jsonl"), tiny_tokenizer())
    (row,) = source.rows
    assert row["messages"] == said and row["tools"] == [{"a": 1}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}]},
        {"messages": [*TURNS, {"role": "tool", "content": "3", "name": "x"}]},
        {"conversations": TURNS},
        {"conversations": SHAREGPT},
        {"messages": SHAREGPT},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"messages": TURNS, "tools": '[{"type": "function"}]'},
        {"messages": TURNS, "meta": {"id": 3}},
    ],
    ids=["a call", "a tool", "conversations", "ShareGPT", "its words", "pairs", "tools", "more"],
)
def test_a_chat_is_accepted_in_all_its_spellings_and_trains(folder, row):
    assert (folder.trains(folder.file("chats.jsonl", lines(*[row] * 8))) / "adapter").is_dir()


def test_a_line_of_fifty_megabytes_is_accepted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines({"text": "ab " * 17_000_000}))
    (source,) = load_sources(sources_of(path), tiny_tokenizer())
    assert len(source.rows[0]["text"]) == 51_000_000


def test_a_stream_from_the_hub_is_checked_as_it_comes():
    def rows():
        yield from ({"text": "a"}, {"text": "b"}, {"text": None})

    stream = iter(checked_stream(IterableDataset.from_generator(rows), RowCheck(["text"]), "hub/x"))
    assert next(stream) == {"text": "a"} and next(stream) == {"text": "b"}
    with pytest.raises(UserError, match="data: hub/x, row 3: text is null"):
        next(stream)


def test_completions_that_all_lie_past_the_row_are_refused(folder):
    pairs = lines(*[{"prompt": "long " * 40, "completion": "x"}] * 9)
    assert "too short: 0 rows of" in folder.train(folder.file("pairs.jsonl", pairs))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("weights", [(None,), (1.0, 2.0), (None, None)])
def test_completions_that_all_lie_past_the_row_are_refused_beside_other_data_too(
    folder, weights, streaming
):
    long = folder.file("long.jsonl", lines(*[{"prompt": "long " * 40, "completion": "x"}] * 9))
    other = folder.file("other.jsonl", lines(*PAIRS))
    sources = [
        {"path": str(path), "weight": weight}
        for path, weight in zip((long, other), weights, strict=False)
    ]
    found = folder.train(long, data={"sources": sources, "streaming": streaming})
    assert "long.jsonl" in found and "data.sequence_length" in found


def test_completions_that_lie_past_the_row_are_told(folder):
    long = [{"prompt": "long " * 40, "completion": "x"}] * 9
    pairs = folder.file("pairs.jsonl", lines(*PAIRS, *long))
    recipe = folder.recipe(pairs, data={"packing": False})
    result = CliRunner().invoke(cli.app, ["train", str(recipe)])
    assert result.exit_code == 0 and "data: 9 rows of" in " ".join(result.output.split())


MEASURE = {"length": 192, "windows": 2}
LONG = (SENTENCE + "\n").encode() * 40


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("text.txt", None, {}, "no text file at"),
        ("text.md", LONG, {}, "must be a .txt or .jsonl file"),
        ("text.csv", LONG, {}, "must be a .txt or .jsonl file"),
        ("text.json", b"[]", {}, "must be a .txt or .jsonl file"),
        ("text.txt", b"short", {}, "the text has 5 tokens, less than one window of 192"),
        ("text.txt", b"", {}, "is empty"),
        ("text.txt", b" \n", {}, "is empty"),
        ("text.txt", LONG, {"length": 600}, "the base has 512 positions"),
        ("text.txt", LONG, {"length": 2**30}, "the base has 512 positions"),
        ("text.txt", LONG + b"\xe9", {}, "line 41 is not UTF-8"),
        ("text.jsonl", LINES.encode(), {}, "is trained on"),
        ("text.jsonl", lines(*TEXTS, {"text": None}), {}, "line 31: text is null"),
    ],
)
def test_a_text_that_cannot_be_measured_on_is_found_before_training(
    folder, name, content, settings, message
):
    if content is not None:
        folder.file(name, content)
    text = str(folder.path / name)
    data = folder.file("data.jsonl", LINES.encode())
    assert message in folder.train(data, measure={"text": text, **MEASURE, **settings})


def test_a_text_that_is_the_data_by_another_name_is_refused(folder):
    data = folder.file("data.jsonl", LINES.encode())
    (folder.path / "link.jsonl").symlink_to(data)
    measure = {"text": str(folder.path / "link.jsonl"), **MEASURE}
    assert "is trained on" in folder.train(data, measure=measure)


BAD_TEXTS = {
    name: BAD_LINES[name]
    for name in (
        "null", "a number", "a truth value", "a list", "an object", "missing", "a line cut off",
        "a line that is a number", "a line that is a list", "a line that is null", "Latin-1",
        "UTF-16", "half a character", "half a surrogate pair", "deep",
    )
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_line_of_a_text_to_measure_on_is_named(folder, content, message):
    path = folder.file("text.jsonl", content)
    found = refusal("measure", folder.base, "--text", path, leaves_alone=folder.path)
    assert message in found and "text.jsonl" in found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", LONG + b"\xe9", "line 41 is not UTF-8"),
        ("text.txt", LONG.decode().encode("utf-16"), "it is UTF-16"),
        ("text.txt", LONG.decode().encode("utf-16-le"), "line 1 holds a NUL byte"),
        ("text.txt", LONG + b"\0", "line 41 holds a NUL byte"),
        ("text.txt", b"", "is empty"),
        ("text.txt", b"\xef\xbb\xbf", "is empty"),
        ("text.jsonl", b"", "is empty"),
        ("text.jsonl", lines({"text": ""}, {"text": " "}), "is empty"),
        ("text.pdf", LONG, "must be a .txt or .jsonl file"),
        ("text", LONG, "must be a .txt or .jsonl file"),
        ("text.txt.gz", LONG, "no whole gzip file"),
        ("text.jsonl.gz", compressed(LINES.encode())[:-9], "no whole gzip file"),
        (os.fsdecode(b"te\xffxt.txt"), LONG, "is not UTF-8"),
    ],
)
def test_a_text_to_measure_on_that_cannot_be_read_is_one_line(folder, name, content, message):
    path = folder.file(name, content)
    found = refusal("measure", folder.base, "--text", path, leaves_alone=folder.path)
    assert message in found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.txt", b"\xef\xbb\xbf" + LONG),
        ("text.TXT", LONG),
        ("text.txt.gz", compressed(LONG)),
        ("text.jsonl", b"\xef\xbb\xbf" + lines({"text": LONG.decode()})),
        ("text.JSONL.gz", compressed(lines({"text": LONG.decode()}, "", {"text": ""}))),
    ],
)
def test_a_text_to_measure_on_is_accepted_as_people_have_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_documents(tmp_path / name)[0] == LONG.decode()


def tokenizer_file(base: Path, change) -> None:
    path = base / "tokenizer.json"
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


FULL = 259  # tokens of the tokenizer; a base with as many embeddings has none for another


@pytest.fixture
def full(tmp_path, tiny_base):
    folder = Folder(tmp_path, tiny_base("llama", vocab_size=FULL))
    tokenizer_file(folder.own_base(), special_token)
    return folder


def more_words(told: dict) -> None:
    told["model"]["vocab"] |= {"zz": VOCAB_SIZE}


def special_token(told: dict) -> None:
    added = dict(told["added_tokens"][0], id=FULL, content="<image>")
    told["added_tokens"].append(added)


def config_of_tokenizer(base: Path, **changes) -> None:
    path = base / "tokenizer_config.json"
    told = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))


@pytest.mark.parametrize("verb", ["train", "check", "measure"])
def test_a_vocabulary_past_the_embeddings_is_refused(folder, verb):
    tokenizer_file(folder.own_base(), more_words)
    data = folder.file("data.jsonl", LINES.encode())
    of = [folder.base, "--text", data] if verb == "measure" else [folder.recipe(data)]
    found = refusal(verb, *of, leaves_alone=folder.path)
    assert "has the token 'zz' under the number 300, and the model has embeddings for 300" in found


def test_a_token_without_an_embedding_in_the_data_is_refused(full):
    data = full.file("data.jsonl", lines(*TEXTS, {"text": "see <image>"}))
    assert "holds '<image>', which is token 259" in full.train(data)


def test_a_token_without_an_embedding_in_a_text_to_measure_on_is_refused(full):
    text = full.file("text.txt", LONG + b"<image>")
    found = refusal("measure", full.base, "--text", text, leaves_alone=full.path)
    assert "holds '<image>', which is token 259" in found
    data, measure = full.file("data.jsonl", LINES.encode()), {"text": str(text), **MEASURE}
    assert "holds '<image>'" in full.train(data, measure=measure)


def test_a_token_without_an_embedding_is_accepted_where_no_text_holds_it(full):
    full.trains(full.file("data.jsonl", LINES.encode()))


@pytest.mark.parametrize("pad", [None, "<image>"], ids=["none", "without an embedding"])
def test_a_token_for_padding_is_accepted_to_be_missing(full, pad):
    config_of_tokenizer(full.base, pad_token=pad)
    assert load_tokenizer(Model(base=str(full.base))).pad_token == "</s>"
    full.trains(full.file("data.jsonl", LINES.encode()), train={"batch_size": 2})


@pytest.mark.parametrize(
    ("eos", "message"),
    [(None, "has no eos_token"), ("<image>", "has the number 259"), ("<new>", "has the number")],
    ids=["none", "without an embedding", "unknown"],
)
def test_a_token_for_the_end_must_be_one(full, eos, message):
    config_of_tokenizer(full.base, eos_token=eos)
    assert message in full.train(full.file("data.jsonl", LINES.encode()))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "Nothing"}}'),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xe9"),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
        ("tokenizer_config.json", b'{"eos_token": 3}'),
    ],
)
@pytest.mark.parametrize("verb", ["train", "measure"])
def test_a_broken_tokenizer_is_one_line(folder, name, content, verb):
    base = folder.own_base()
    (base / name).unlink() if content is None else (base / name).write_bytes(content)
    data = folder.file("data.jsonl", LINES.encode())
    of = [base, "--text", data] if verb == "measure" else [folder.recipe(data)]
    assert "base" in refusal(verb, *of, leaves_alone=folder.path)


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD", "Lowercase"])
def test_a_normal_form_that_transformers_swaps_is_told(tmp_path, tiny_base, form):
    base = Path(shutil.copytree(tiny_base("qwen2"), tmp_path / "base"))
    loaded = load_swapped(base)
    other = {"type": form} if loaded is None or loaded["type"] != form else None
    tokenizer_file(base, lambda told: told.update(normalizer=other))
    with pytest.raises(UserError, match="is not read as it stands.*normalizer"):
        load_tokenizer(Model(base=str(base)))


def load_swapped(base: Path) -> dict | None:
    """What transformers puts in place of the file's normalizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]


def removes_all(told: dict) -> None:
    told["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": ""}


@pytest.mark.parametrize("rows", [TEXTS, PAIRS, CHATS], ids=["text", "pairs", "chats"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_tokenizer_that_makes_nothing_of_the_data_is_refused(folder, rows, streaming):
    tokenizer_file(folder.own_base(), removes_all)
    data = folder.file("data.jsonl", lines(*rows))
    found = folder.train(data, data={"streaming": streaming})
    assert "makes no tokens of" in found and "data.jsonl" in found


def test_a_tokenizer_that_makes_nothing_of_a_text_to_measure_on_is_refused(folder):
    tokenizer_file(folder.own_base(), removes_all)
    text = folder.file("text.txt", LONG)
    found = refusal("measure", folder.base, "--text", text, leaves_alone=folder.path)
    assert "makes no tokens of the text" in found


def test_a_tokenizer_that_has_no_letter_a_is_accepted(folder):
    removes = {"type": "Replace", "pattern": {"String": "a"}, "content": ""}
    tokenizer_file(folder.own_base(), lambda told: told.update(normalizer=removes))
    tokenizer = load_tokenizer(Model(base=str(folder.base)))
    assert prepended_token(tokenizer) is None
    assert cut_windows([SENTENCE], tokenizer, 16, 1).shape == (1, 16)


RECIPE = "output_dir: runs/x\nmodel: {base: some/model}\ndata: {sources: [{path: text.jsonl}]}\n"


def laughs(levels: int) -> str:
    """A list of ten times itself, and so on, in a few hundred letters."""
    keys = "bcdefgh"[:levels]
    rows = [f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in zip("a" + keys, keys)]  # noqa: B905
    return "\n".join(["train: &a [x, x, x]", *rows, RECIPE])


BAD_RECIPES = {
    "UTF-16": (RECIPE.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "Latin-1": ((RECIPE + "# café\n").encode("latin-1"), "line 4 is not UTF-8"),
    "half a character": (RECIPE.encode() + b"# \xe2\x82\n", "line 4 is not UTF-8"),
    "a NUL": (RECIPE.encode() + b"\0", "line 4 holds a NUL byte"),
    "nothing": (b"", "is not a recipe"),
    "a comment": (b"# x\n", "is not a recipe"),
    "a list": (b"- a\n", "is not a recipe"),
    "text": (b"hello\n", "is not a recipe"),
    "a number": (b"3\n", "is not a recipe"),
    "two recipes": ((RECIPE + "---\n" + RECIPE).encode(), "is not YAML"),
    "a tab": ((RECIPE + "train:\n\tseed: 1\n").encode(), "is not YAML"),
    "a number of 5,000 digits": ((RECIPE + f"x: {'9' * 5000}\n").encode(), "is not YAML"),
    "a date that is none": ((RECIPE + "x: 2020-13-45\n").encode(), "is not YAML"),
    "a Python object": ((RECIPE + "x: !!python/name:os.system\n").encode(), "is not YAML"),
    "a tag": ((RECIPE + "x: !y {}\n").encode(), "is not YAML"),
    "a list for a key": ((RECIPE + "? [a]\n: 1\n").encode(), "is not YAML"),
    "an alias of nothing": ((RECIPE + "train: *z\n").encode(), "is not YAML"),
    "lists 900 deep": ((RECIPE + "x: " + "[" * 900 + "]" * 900).encode(), "nested too deeply"),
    "sections 900 deep": ((RECIPE + "x: " + "{a: " * 900).encode(), "nested too deeply"),
    "a section in itself": ((RECIPE + "train: &a {seed: *a}\n").encode(), "train.seed: input"),
    "a list that grows": (laughs(7).encode(), "train: input should be"),
    "a number for a key": ((RECIPE + "1: 2\n").encode(), "keys should be strings"),
    "a long value": ((RECIPE + f"train: {{seed: {'x' * 9999}}}\n").encode(), "train.seed: input"),
    "a long list": ((RECIPE + f"train: {{seed: [{'1,' * 9999}1]}}\n").encode(), "train.seed"),
    "binary": ((RECIPE + "train: {report_to: !!binary aGk=}\n").encode(), "train.report_to"),
    "null for a section": ((RECIPE + "train:\n").encode(), "train: input should be a valid dict"),
    "text for a section": ((RECIPE + "train: x\n").encode(), "train: input should be a valid dict"),
    "a list for a section": ((RECIPE + "gate: [1]\n").encode(), "gate: input should be a valid"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_file_that_is_no_recipe_is_one_line(folder, content, message):
    path = folder.file("recipe.yaml", content)
    assert message in refusal("train", path, leaves_alone=folder.path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=''", "output_dir: is empty"),
        ("output_dir=' '", "output_dir: is empty"),
        ("model.base=''", "model.base: is empty"),
        ("data.sources=[{path: ''}]", "data.sources.0.path: is empty"),
        ("data.sources=[]", "data.sources: list should have at least 1 item"),
        ("data.sources=[a.jsonl]", "data.sources.0: input should be a valid dictionary"),
        ("data.sources=a.jsonl", "data.sources: input should be a valid list"),
        ('output_dir="a\\0b"', "holds what is no character"),
        ('output_dir="a\\ud800b"', "holds what is no character"),
        ('model.base="a\\0b"', "holds what is no character"),
        ('data.sources=[{path: "a\\0.jsonl"}]', "holds what is no character"),
        ("output_dir=$RETROFIT_UNSET/x", "the variable $RETROFIT_UNSET is not set"),
        ("output_dir=${RETROFIT_UNSET}/x", "the variable ${RETROFIT_UNSET} is not set"),
        ("model.base=$RETROFIT_UNSET/x", "the variable $RETROFIT_UNSET is not set"),
        ("data.sources=[{path: $RETROFIT_UNSET/a.txt}]", "the variable $RETROFIT_UNSET is not"),
        ("measure={text: $RETROFIT_UNSET/a.txt}", "the variable $RETROFIT_UNSET is not set"),
        ("data.sequence_length=1000000000000", "tokens at once"),
        ("data.sequence_length=600", "more than the 512 positions of the base"),
        ("train.batch_size=1000000000", "tokens at once"),
        ("train.batch_size=1000000000000000000000", "should be less than 2147483648"),
        ("train.max_steps=1000000000000000000000", "should be less than 2147483648"),
        ("train.gradient_accumulation_steps=99999999999", "should be less than 2147483648"),
        ("train.gradient_accumulation_steps=2000000000", "and one step takes 2000000000"),
        ("train.save_steps=99999999999", "should be less than 2147483648"),
        ("train.epochs=1e300", "train.epochs: input should be less than or equal to 1000000"),
        ("train.warmup_steps=-1", "train.warmup_steps: input should be greater"),
        ("objective.sampled_rows=10000000000", "objective.sampled_rows: input should be less"),
        ("measure={text: a.txt, length: 99999999999}", "measure.length: input should be less"),
        ("measure={text: a.txt, windows: 99999999999}", "measure.windows: input should be less"),
        ("gate.layers=[1000000000000]", "layer"),
        ("gate.layers=[3]", "layer"),
        ("train.seed=" + "[" * 900, "is not a YAML value"),
        ("train.seed=" + "9" * 5000, "is not a YAML value"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(folder, monkeypatch, override, message):
    monkeypatch.delenv("RETROFIT_UNSET", raising=False)
    recipe = folder.recipe(folder.file("data.jsonl", LINES.encode()))
    assert message in refusal("train", recipe, override, leaves_alone=folder.path)


def test_a_variable_in_a_path_is_accepted_and_expanded(folder, monkeypatch):
    monkeypatch.setenv("RETROFIT_HERE", str(folder.path))
    folder.file("data.jsonl", LINES.encode())
    recipe = folder.recipe("$RETROFIT_HERE/data.jsonl", measure={"text": "${RETROFIT_HERE}/t.txt"})
    loaded = load_recipe(str(recipe), ["output_dir=$RETROFIT_HERE/run"])
    assert loaded.output_dir == str(folder.path / "run")
    assert loaded.data.sources[0].path == str(folder.path / "data.jsonl")
    assert loaded.measure.text == str(folder.path / "t.txt")


def test_a_file_with_a_dollar_in_its_name_is_accepted(folder, monkeypatch):
    monkeypatch.setenv("five", "wrong")
    path = folder.file("cost$five.jsonl", LINES.encode())
    assert load_recipe(str(folder.recipe(path))).data.sources[0].path == str(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_recipe_with_a_byte_order_mark_is_accepted(tmp_path, end):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", end).encode())
    assert load_recipe(str(path)).model.base == "some/model"
