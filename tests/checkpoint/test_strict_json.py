"""JSON is read strictly: what Python's parser would let pass silently is refused, with the file named."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelrig.checkpoint.strict_json import TooManyError, is_deeper, load_json, parse
from modelrig.errors import CheckpointError, ConfigError, FileError, IndexFileError, TokenizerError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def nesting(value):
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(nesting, items), default=0)


@given(json_values, st.booleans())
def test_what_is_valid_is_read_as_python_reads_it(value, ascii_only):
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert value == parse(data)


@given(json_values)
def test_nesting_is_measured_exactly_without_parsing(value):
    data = json.dumps(value, ensure_ascii=False).encode()
    deepest = nesting(value)
    assert (True, False) == (deepest == 0 or is_deeper(data, deepest - 1), is_deeper(data, deepest))


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ('{"a": 1, "a": 2}', "CF-DUPKEY", "duplicate key 'a'"),
        ('{"a": {"b": 1, "b": 1}}', "CF-DUPKEY", "duplicate key 'b'"),
        ('{"a": NaN}', "CF-JSON", "NaN"),
        ('{"a": -Infinity}', "CF-JSON", "-Infinity"),
        ('{"a": 12345678901234567890}', "CF-JSON", "20 digits"),
        ('{"a": ' + "9" * 5000 + "}", "CF-JSON", "5000 digits"),
        ("[" * 100_000, "CF-LIMIT", "nested more than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "CF-LIMIT", "nested more than 64"),
        ('{"a": "' + '\\"' + "[" * 100 + "]", "CF-JSON", "not JSON"),
        ('{"a": 1', "CF-JSON", "line 1, column 8"),
        ('{"a": 1} x', "CF-JSON", "Extra data"),
        ("", "CF-JSON", "line 1, column 1"),
        ("[1]", "CF-JSON", "object is needed"),
        ("null", "CF-JSON", "object is needed"),
        ('\ufeff{"a": 1}', "CF-JSON", "BOM"),
        ('{"\\ud800": 1}', "CF-JSON", "surrogate"),
        (b'{"a": "\xff"}', "CF-JSON", "not UTF-8 at byte 7"),
        (" " * 2000, "CF-LIMIT", "2,000 bytes; at most 1,000"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_not_acceptable_is_refused_with_file_and_reason(tmp_path, text, code, says):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    limit = 1000 if says.startswith("2,000") else 1 << 20
    with pytest.raises(ConfigError) as caught:
        load_json(path, error=ConfigError, prefix="CF", max_bytes=limit)
    assert (code, str(path)) == (caught.value.code, caught.value.path)
    assert says in caught.value.reason


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"rope_theta": NaN}', "rope_theta"),
        ('{"rope": [0, {"factor": -Infinity}]}', "rope[1].factor"),
        ('{"a": {"b": [1, 12345678901234567890]}, "c": 1}', "a.b[1]"),
        ('{"a": 1, "eps": 1e400}', "eps"),
        ('{"eps": -1E+999, "other": 1e-999}', "eps"),
        ('{"eps": ' + "9" * 400 + ".0}", "eps"),
    ],
)
def test_the_key_of_a_number_that_is_none_is_the_locus(tmp_path, text, key):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_json(path, error=ConfigError, prefix="CF")
    assert ("CF-JSON", key) == (caught.value.code, caught.value.locus)


def test_large_and_small_numbers_that_fit_are_numbers():
    assert {"a": 1e300, "b": 1e-300, "c": 0.0} == parse(b'{"a": 1e300, "b": 1E-300, "c": 1e-999}')


def test_more_lists_and_objects_than_allowed_are_refused_before_they_are_made():
    assert [[]] * 9 == parse(b"[" + b"[]," * 8 + b"[]]", max_containers=10)
    with pytest.raises(TooManyError, match="11 lists and objects; at most 10"):
        parse(b"[" + b"[]," * 9 + b"[]]", max_containers=10)
    assert ["[[[]]]" * 10] == parse(json.dumps(["[[[]]]" * 10]).encode(), max_containers=1)


@pytest.mark.parametrize("text", ["\\\\", '\\"[', '\\\\"', '\\\\\\"[[', "\\n[", '[\\"]'], ids=ascii)
def test_backslashes_hide_no_bracket(text):
    data = json.dumps({text: [text]}).encode()
    assert (False, True) == (is_deeper(data, 2), is_deeper(data, 1))


def test_a_duplicate_key_is_the_locus(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 1, "hidden_size": 2}')
    with pytest.raises(ConfigError) as caught:
        load_json(path, error=ConfigError, prefix="CF")
    assert "hidden_size" == caught.value.locus


def test_long_digits_inside_a_text_are_no_number(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": "12345678901234567890123", "b": 1234567890123456789}')
    assert {"a": "12345678901234567890123", "b": 1234567890123456789} == load_json(path, error=ConfigError, prefix="CF")


def test_brackets_inside_texts_are_no_nesting():
    assert {"a": "[" * 1000, 'q"[[': "{\\"} == parse(json.dumps({"a": "[" * 1000, 'q"[[': "{\\"}).encode())


@pytest.mark.parametrize(
    ("error", "prefix", "code"),
    [(ConfigError, "CF", "CF-MISSING"), (TokenizerError, "TK", "TK-MISSING"), (FileError, "IX", "IO-READ")],
)
def test_a_file_that_is_not_there_is_said_so(tmp_path, error, prefix, code):
    with pytest.raises(error) as caught:
        load_json(tmp_path / "x.json", error=IndexFileError if prefix == "IX" else error, prefix=prefix)
    assert (code, "not exist") == (caught.value.code, "not exist" if "not exist" in caught.value.reason else "")


def test_a_family_without_a_code_of_its_own_uses_its_general_one(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(TokenizerError) as caught:
        load_json(path, error=TokenizerError, prefix="TK")
    assert "TK-JSON" == caught.value.code


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to nothing", "link to itself", "unreadable"])
def test_what_is_not_a_regular_readable_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "config.json"
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "link to nothing": lambda: path.symlink_to("nowhere"),
        "link to itself": lambda: path.symlink_to(path),
        "unreadable": lambda: (path.write_text("{}"), path.chmod(0)),
    }
    make[kind]()
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    with pytest.raises(CheckpointError) as caught:
        load_json(path, error=ConfigError, prefix="CF")
    expected = "IO-TYPE" if kind in ("folder", "pipe", "device") else "IO-READ"
    assert (expected, str(path)) == (caught.value.code, caught.value.path)
