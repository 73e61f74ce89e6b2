"""The sources `local` and `bundled`: folders on this machine, and models that ship in the package."""

import os

import pytest

from modelrig.errors import FileError, SourceError
from modelrig_plugins.formats.safetensors import SafetensorsPlanner
from modelrig_plugins.sources.bundled import BundledPlanner, bundled_names
from modelrig_plugins.sources.hub import HubPlanner
from modelrig_plugins.sources.local import LocalPlanner
from modelrig_plugins.sources.local_module import LocalFetcher
from tensorfiles import write_sharded, write_valid

PLANNERS = {"local": LocalPlanner, "bundled": BundledPlanner, "hub": HubPlanner}


def claimants(reference):
    return [name for name, planner in PLANNERS.items() if planner.claims(reference)]


@pytest.mark.parametrize(
    ("reference", "claimed_by"),
    [
        ("tiny", ["bundled"]),
        ("here", ["local"]),
        ("org/here", ["local"]),
        ("org/name", ["hub"]),
        ("org/name@v1.0", ["hub"]),
        ("org/name@refs/pr/3", ["hub"]),
        ("./missing", ["local"]),
        ("~/missing", ["local"]),
        ("/missing/too", ["local"]),
        ("", []),
        ("nothing-like-it", []),
        ("a/b/c", []),
        ("../../etc", ["local"]),
        ("nowhere/..", []),
        ("org/name@../../x", []),
        ("org/name@", []),
        ("-x/name", []),
        ("org/na me", []),
        ("http://host/name", []),
        ("org/name\0", []),
        ("x" * 5000, []),
    ],
)
def test_exactly_one_source_claims_what_is_written_like_its_own(tmp_path, monkeypatch, reference, claimed_by):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert claimed_by == claimants(reference)


@pytest.mark.parametrize("name", ["tiny", "org/name"])
def test_an_existing_path_goes_before_every_other_reading(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert ["local"] == claimants(name)
    assert tmp_path / name == LocalPlanner.resolve(name).root


def test_a_folder_is_resolved_as_it_is(tmp_path, monkeypatch):
    write_valid(tmp_path / "model.safetensors", a=("F32", [2]))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    snapshot = LocalPlanner.resolve(f"~/{tmp_path.name}")
    assert (tmp_path, "local", True, (), None) == (
        snapshot.root, snapshot.source, snapshot.complete, snapshot.link_roots, snapshot.revision,
    )  # fmt: skip
    assert snapshot == LocalFetcher.fetch(snapshot, None)


@pytest.mark.parametrize("kind", ["file", "nothing", "link to nothing", "pipe"])
def test_what_is_not_a_folder_is_said_so(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    make = {
        "file": path.touch,
        "nothing": lambda: None,
        "link to nothing": lambda: path.symlink_to("x"),
        "pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    with pytest.raises(SourceError) as caught:
        LocalPlanner.resolve(str(path))
    assert ("SR-UNKNOWN", str(path)) == (caught.value.code, caught.value.path)
    assert (str(tmp_path) in (caught.value.hint or "")) == (kind == "file")


@pytest.fixture
def hub_cache(tmp_path):
    """A repository of the hub's cache: shards are links into the blobs folder beside the snapshots."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    write_sharded(snapshot, {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b"]})
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("reached", ["directly", "by a link"])
def test_a_snapshot_of_the_hubs_cache_may_link_into_its_blobs(hub_cache, tmp_path, reached):
    folder = hub_cache
    if reached == "by a link":
        folder = tmp_path / "link"
        folder.symlink_to(hub_cache)
    snapshot = LocalPlanner.resolve(str(folder))
    assert (folder, hub_cache.name) == (snapshot.root, snapshot.revision)
    assert {"a", "b"} == set(SafetensorsPlanner.catalog(snapshot).entries)


def test_a_blobs_folder_that_is_a_link_makes_nothing_else_part_of_the_checkpoint(hub_cache, tmp_path):
    blobs = hub_cache.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    snapshot = LocalPlanner.resolve(str(hub_cache))
    with pytest.raises(FileError) as caught:
        SafetensorsPlanner.catalog(snapshot)
    assert ((), "IO-PATH") == (snapshot.link_roots, caught.value.code)


def test_the_folder_above_the_snapshots_is_no_checkpoint(hub_cache):
    with pytest.raises(SourceError) as caught:
        LocalPlanner.resolve(str(hub_cache.parent.parent))
    assert "SR-UNKNOWN" == caught.value.code
    assert hub_cache.name in caught.value.hint


def test_bundled_models_are_complete_checkpoints_of_this_package():
    assert "tiny" in bundled_names()
    for name in bundled_names():
        snapshot = BundledPlanner.resolve(name)
        assert (True, "bundled") == (snapshot.complete, snapshot.source)
        assert SafetensorsPlanner.catalog(snapshot).total_bytes > 0


def test_an_unknown_bundled_name_is_told_what_there_is():
    with pytest.raises(SourceError) as caught:
        BundledPlanner.resolve("tinny")
    assert ("SR-UNKNOWN", True) == (caught.value.code, "did you mean 'tiny'" in caught.value.reason)
