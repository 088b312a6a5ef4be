"""Documents that others wrote: parsed within bounds, and every fault named by file and field."""

from __future__ import annotations

import math
import time

import pytest

from dream4d_engine.documents import (
    MOST_BYTES,
    as_object,
    describe,
    disguise,
    field,
    parse_document,
    printable,
    read_document,
    shortened,
)


class Complaint(ValueError):
    """What the caller asked to be raised."""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", b'{"a": [1, 2.5, null, true]}'),
        ("a.json", b'\xef\xbb\xbf{"a": [1, 2.5, null, true]}'),
        ("a.yaml", b"a:\n- 1\n- 2.5\n- null\n- true\n"),
        ("a.yml", b"\xef\xbb\xbfa: [1, 2.5, ~, yes]"),
    ],
)
def test_documents_are_read_with_or_without_a_mark(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text)
    assert read_document(path, Complaint) == {"a": [1, 2.5, None, True]}


BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("k"))
)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("deep.json", b"[" * 100_000, "nested too deep"),
        ("deep.yaml", b"[" * 3000, "nested too deep|not valid YAML"),
        ("deeper.json", b"[" * 100 + b"]" * 100, "nested too deep"),
        ("bomb.yaml", BOMB, "grows without end by its references"),
        ("loop.yaml", b"&a [*a]", "nested too deep or grows"),
        ("half.json", b'{"a": ', "not valid JSON"),
        ("latin.json", b'{"a": "\xe9"}', "no text in UTF-8: save it in this encoding"),
        ("wide.json", '{"a": 1}'.encode("utf-16"), "no text in UTF-8: save it in this encoding"),
        ("wide.yaml", "a: 1".encode("utf-16-le"), "no text in UTF-8: save it in this encoding"),
        ("digits.json", b"1" * 10_000, "not valid JSON"),
        ("program.yaml", b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("tabs.yaml", b"a:\n\t- b", "not valid YAML"),
        ("large.yaml", b"#" * (MOST_BYTES["YAML"] + 1), "more than"),
        ("pointer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("page.json", b"<!DOCTYPE html><html></html>", "web page"),
        ("nothing.json", b"", "is empty"),
    ],
)
def test_what_is_no_document_is_named_in_no_time(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_bytes(text)
    began = time.monotonic()
    with pytest.raises(Complaint, match=says) as found:
        read_document(path, Complaint)
    assert str(path) in str(found.value) and "\n" not in str(found.value)
    assert time.monotonic() - began < 5


def test_a_missing_document_is_named(tmp_path):
    with pytest.raises(Complaint, match=r"none\.json can't be read: No such file"):
        read_document(tmp_path / "none.json", Complaint)


def test_a_long_text_is_refused_before_it_is_parsed():
    with pytest.raises(Complaint, match="the header holds .* bytes of JSON"):
        parse_document(" " * (MOST_BYTES["JSON"] + 1), "the header", Complaint)


@pytest.mark.parametrize("content", [None, [], "text", 3, {1: 2}])
def test_what_is_no_object_is_named(content):
    with pytest.raises(Complaint, match="config.json (must hold an object|has a name that is no text)"):
        as_object(content, "config.json", Complaint)


TREE = {
    "count": 3,
    "whole": 4.0,
    "share": 0.5,
    "name": "x",
    "on": True,
    "list": [1],
    "nan": math.nan,
    "inf": math.inf,
    "none": None,
}


@pytest.mark.parametrize(
    ("name", "kind", "default", "value"),
    [
        ("count", int, 0, 3),
        ("whole", int, 0, 4),
        ("count", float, 0.0, 3.0),
        ("share", float, 0.0, 0.5),
        ("name", str, "", "x"),
        ("on", bool, False, True),
        ("list", list, [], [1]),
        ("none", int, 7, 7),
        ("missing", str, "d", "d"),
    ],
)
def test_fields_have_their_kinds(name, kind, default, value):
    found = field(TREE, name, kind, "f.json", Complaint, default)
    assert found == value and type(found) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [("share", int), ("on", int), ("on", float), ("nan", float), ("inf", int), ("name", float), ("count", str)],
)
def test_fields_of_other_kinds_are_named(name, kind):
    with pytest.raises(Complaint, match=f"f.json: {name} must be .*, got"):
        field(TREE, name, kind, "f.json", Complaint, kind())


def test_what_is_shown_moves_no_cursor_and_is_short():
    assert printable("a\x1b[2Jb\nc\u202ed\ud800") == "a\ufffd[2Jb c\ufffdd\ufffd"
    assert printable("Größe 立方体 🙂") == "Größe 立方体 🙂"
    assert shortened("abcdef", 4) == "abc…" and shortened("abcd", 4) == "abcd"
    assert len(describe("x" * 1000)) == 40


@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x89PNG", b"{}", b"<3"])
def test_other_files_are_not_taken_for_disguises(head):
    assert disguise(head) is None


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_named(encoding):
    with pytest.raises(ValueError, match="run.json is no text in UTF-8: save it in this encoding"):
        parse_document('{"prompt": "un caf\u00e9"}'.encode(encoding), "run.json", ValueError)
