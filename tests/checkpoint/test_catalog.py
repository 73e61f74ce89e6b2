"""Index and headers together: every tensor is where the index says, and nothing else is used."""

import gc
import json
import os
from functools import partial

import pytest

from modelrig.checkpoint.catalog import catalog_sharded, catalog_single, list_tensor_files
from modelrig.checkpoint.headers import read_header
from modelrig.components import Snapshot
from modelrig.errors import FileError, FormatError, IndexFileError
from tensorfiles import encode, write_sharded, write_valid

ONE, TWO, THREE = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
INDEX = "model.safetensors.index.json"
SHARDS = {ONE: ["a", "b"], TWO: ["c"], THREE: ["d", "e"]}

sharded = partial(catalog_sharded, index_name=INDEX, format="st", suffix=".safetensors", read_header=read_header)
single = partial(catalog_single, format="st", read_header=read_header)


def snapshot(folder, **more):
    return Snapshot(reference=str(folder), root=folder, source="local", **more)


@pytest.fixture
def folder(tmp_path):
    return write_sharded(tmp_path, SHARDS)


def rewrite_index(folder, **changes):
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"].update(changes)
    table["weight_map"] = {name: shard for name, shard in table["weight_map"].items() if shard is not None}
    (folder / INDEX).write_text(json.dumps(table))


def test_a_sharded_checkpoint_has_all_tensors_with_their_files(folder):
    made = sharded(snapshot(folder))
    assert {"a": ONE, "b": ONE, "c": TWO, "d": THREE, "e": THREE} == {n: made.files[e.file].name for n, e in made.entries.items()}
    assert ((), INDEX, 5 * 24) == (made.notes, made.index, made.total_bytes)


def test_each_file_carries_the_identity_it_had(folder):
    file = sharded(snapshot(folder)).files[1]
    status = os.stat(folder / TWO)
    assert (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev) == file.identity
    assert (TWO, folder / TWO, status.st_size) == (file.name, file.path, file.size)


def test_metadata_is_the_headers_and_the_indexs_texts(tmp_path):
    write_sharded(tmp_path, {ONE: ["a"]}, metadata={"dtype": "bfloat16", "total_size": 24})
    (tmp_path / ONE).write_bytes(
        encode({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, 24)
    )
    assert {"format": "pt", "dtype": "bfloat16"} == sharded(snapshot(tmp_path)).metadata


def test_all_missing_shards_are_listed_with_their_tensors(folder):
    (folder / ONE).unlink()
    (folder / THREE).unlink()
    (folder / THREE).symlink_to("gone")
    with pytest.raises(IndexFileError) as caught:
        sharded(snapshot(folder))
    assert "IX-MISSING" == caught.value.code
    assert f"2 of 3 shards do not exist: {ONE} (2 tensors), {THREE} (2 tensors)" == caught.value.reason


def test_a_tensor_in_another_shard_than_the_index_says_names_the_shard_that_has_it(folder):
    rewrite_index(folder, a=TWO)
    with pytest.raises(IndexFileError) as caught:
        sharded(snapshot(folder))
    assert ("IX-NOTENSOR", "a", str(folder / INDEX)) == (caught.value.code, caught.value.locus, caught.value.path)
    assert f"is not in {TWO}, where the index places it; {ONE} has it" == caught.value.reason


def test_a_tensor_that_no_shard_has_is_said_so(folder):
    rewrite_index(folder, z=TWO)
    with pytest.raises(IndexFileError) as caught:
        sharded(snapshot(folder))
    assert ("IX-NOTENSOR", "z") == (caught.value.code, caught.value.locus)
    assert "no shard has it" in caught.value.reason


@pytest.mark.parametrize("indexed", [ONE, TWO, None])
def test_the_same_tensor_in_two_shards_is_refused_with_both(folder, indexed):
    write_valid(folder / TWO, a=("F32", [2, 3]), c=("F32", [2, 3]))
    rewrite_index(folder, a=indexed)
    with pytest.raises(IndexFileError) as caught:
        sharded(snapshot(folder))
    assert ("IX-DUP", "a", f"is in {ONE} and in {TWO}") == (caught.value.code, caught.value.locus, caught.value.reason)


def test_a_tensor_the_index_does_not_name_is_noted_and_not_used(folder):
    rewrite_index(folder, b=None)
    made = sharded(snapshot(folder))
    assert {"a", "c", "d", "e"} == set(made.entries)
    assert "not in the index and not used: 'b'" == made.notes[0]


def test_shards_the_index_does_not_name_are_noted_and_not_opened(folder):
    (folder / "model-00004-of-00004.safetensors").write_bytes(b"not even a tensor file")
    assert ("files the index does not name, not read: 'model-00004-of-00004.safetensors'",) == sharded(snapshot(folder)).notes


@pytest.mark.parametrize("claimed", [-1, 1e30, "many", None, 10**18])
def test_a_wrong_total_size_is_a_note(tmp_path, claimed):
    write_sharded(tmp_path, SHARDS, metadata={"total_size": claimed})
    assert (f"the index says total_size {claimed!r}, its tensors have 120 bytes",) == sharded(snapshot(tmp_path)).notes


@pytest.mark.parametrize("metadata", [{}, None, [1], "x"])
def test_an_index_needs_no_metadata(tmp_path, metadata):
    write_sharded(tmp_path, SHARDS, metadata=metadata)
    assert () == sharded(snapshot(tmp_path)).notes


def test_shards_of_two_series_are_noted(tmp_path):
    write_sharded(tmp_path, {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00003.safetensors": ["b"]})
    assert "of-00002, of-00003" in sharded(snapshot(tmp_path)).notes[0]


def test_a_shard_that_breaks_its_format_is_named(folder):
    (folder / TWO).write_bytes(b"")
    with pytest.raises(FormatError) as caught:
        sharded(snapshot(folder))
    assert ("ST-SHORT", str(folder / TWO)) == (caught.value.code, caught.value.path)


@pytest.mark.parametrize("name", [ONE, INDEX])
def test_links_out_of_the_folder_are_refused_even_if_what_they_point_to_is_valid(folder, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside") / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(FileError) as caught:
        sharded(snapshot(folder))
    assert ("IO-PATH", str(folder / name)) == (caught.value.code, caught.value.path)
    assert 5 == len(sharded(snapshot(folder, link_roots=(outside.parent,))).entries)


def test_a_snapshot_without_its_tensor_files_is_catalogued_from_their_headers(folder, tmp_path_factory):
    beside = tmp_path_factory.mktemp("headers")
    whole = sharded(snapshot(folder))
    headers = {}
    for shard in (ONE, TWO):
        raw = (folder / shard).read_bytes()
        (beside / shard).write_bytes(raw[: len(raw) - 24 * len(SHARDS[shard])])
        (folder / shard).unlink()
        headers[shard] = (len(raw), beside)
    made = sharded(snapshot(folder, complete=False, headers=headers))
    assert (whole.entries, whole.notes) == (made.entries, made.notes)
    assert [None, None, whole.files[2].identity] == [file.identity for file in made.files]
    assert [(file.path, file.size) for file in whole.files] == [(file.path, file.size) for file in made.files]


def test_a_single_file_is_its_own_catalog(tmp_path):
    write_valid(tmp_path / "x.safetensors", a=("BF16", [4]))
    made = single(snapshot(tmp_path), "x.safetensors", notes=["seen"])
    assert (["a"], None, ("seen",), ["x.safetensors"]) == (list(made.entries), made.index, made.notes, [f.name for f in made.files])


def test_what_looks_like_tensor_files_is_listed_whatever_its_format(tmp_path):
    for name in ("pytorch_model.bin", "model.gguf", "config.json", "README.md", "MODEL.PT"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.bin").mkdir()
    waiting = snapshot(tmp_path, complete=False, headers={"far.safetensors": (8, tmp_path)})
    assert ("MODEL.PT", "far.safetensors", "model.gguf", "pytorch_model.bin") == list_tensor_files(waiting)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(folder, enabled):
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        sharded(snapshot(folder))
        (folder / ONE).unlink()
        with pytest.raises(IndexFileError):
            sharded(snapshot(folder))
        assert enabled == gc.isenabled()
    finally:
        (gc.enable if was else gc.disable)()
