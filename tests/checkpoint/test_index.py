"""The index of shards is judged before any shard is opened."""

import json

import pytest

from modelrig.checkpoint import index
from modelrig.checkpoint.index import read_index
from modelrig.errors import FileError, IndexFileError

SHARD = "model-00001-of-00001.safetensors"


def write(tmp_path, table):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(table if isinstance(table, bytes) else (table if isinstance(table, str) else json.dumps(table)).encode())
    return path


def test_a_valid_index_counts_the_tensors_of_each_shard(tmp_path):
    table = {"metadata": {"total_size": 9}, "weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    read = read_index(write(tmp_path, table), suffix=".safetensors")
    assert [("1.safetensors", 1), ("2.safetensors", 2)] == list(read.shards.items())
    assert (table["weight_map"], table["metadata"]) == (read.weight_map, read.metadata)


def mapped(value):
    return {"weight_map": {"fine": SHARD, "w": value}}


@pytest.mark.parametrize(
    ("table", "code", "locus"),
    [
        ("{", "IX-JSON", None),
        ("[]", "IX-JSON", None),
        ('{"weight_map": {"a": NaN}}', "IX-JSON", "weight_map.a"),
        (b"\xff\xfe", "IX-JSON", None),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "IX-DUPKEY", "w"),
        ('{"weight_map": {}, "weight_map": {}}', "IX-DUPKEY", "weight_map"),
        ("[" * 100_000, "IX-LIMIT", None),
        ({}, "IX-FIELD", "weight_map"),
        ({"weight_map": {}}, "IX-FIELD", "weight_map"),
        ({"weight_map": None}, "IX-FIELD", "weight_map"),
        ({"weight_map": [SHARD]}, "IX-FIELD", "weight_map"),
        (mapped(1), "IX-FIELD", "w"),
        (mapped(None), "IX-FIELD", "w"),
        (mapped([SHARD]), "IX-FIELD", "w"),
        (mapped("../" + SHARD), "IX-PATH", "w"),
        (mapped("/etc/" + SHARD), "IX-PATH", "w"),
        (mapped("C:\\" + SHARD), "IX-PATH", "w"),
        (mapped("C:" + SHARD), "IX-PATH", "w"),
        (mapped("\\\\host\\" + SHARD), "IX-PATH", "w"),
        (mapped("a/../" + SHARD), "IX-PATH", "w"),
        (mapped("sub/" + SHARD), "IX-PATH", "w"),
        (mapped("a\0" + SHARD), "IX-PATH", "w"),
        (mapped("."), "IX-PATH", "w"),
        (mapped(""), "IX-PATH", "w"),
        (mapped("con.safetensors"), "IX-PATH", "w"),
        (mapped("model.safetensors.index.json"), "IX-TYPE", "w"),
        (mapped("config.json"), "IX-TYPE", "w"),
        (mapped("pytorch_model.bin"), "IX-TYPE", "w"),
        (mapped(".safetensors"), "IX-TYPE", "w"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_an_index_that_breaks_a_rule_is_refused_with_the_tensor_it_is_about(tmp_path, table, code, locus):
    path = write(tmp_path, table)
    with pytest.raises(IndexFileError) as caught:
        read_index(path, suffix=".safetensors")
    assert (code, str(path), locus) == (caught.value.code, caught.value.path, caught.value.locus)


@pytest.mark.parametrize(("limit", "says"), [("MAX_TENSORS", "3 tensors"), ("MAX_SHARDS", "3 files"), ("MAX_INDEX_BYTES", "bytes")])
def test_an_index_larger_than_the_limits_is_refused(tmp_path, monkeypatch, limit, says):
    path = write(tmp_path, {"weight_map": {name: f"{name}.safetensors" for name in "abc"}})
    monkeypatch.setattr(index, limit, 2)
    with pytest.raises(IndexFileError) as caught:
        read_index(path, suffix=".safetensors")
    assert "IX-LIMIT" == caught.value.code
    assert says in caught.value.reason


def test_an_index_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "i").mkdir()
    with pytest.raises(FileError) as caught:
        read_index(tmp_path / "i", suffix=".safetensors")
    assert "IO-TYPE" == caught.value.code
