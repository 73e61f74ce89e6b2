"""Names out of a checkpoint's files may name files of its folder, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelrig.checkpoint.paths import inside, name_problem, optional
from modelrig.components import Snapshot
from modelrig.errors import FileError

OUTSIDE = [
    "../x", "/abs", "a/../b", "sub/x", "a\0b", ".", "..", "", "C:\\x", "C:x", "\\\\host\\x", "x\\y", "x.safetensors:stream",
    "con", "CON.safetensors", "Aux.x", "com1.safetensors", "LPT9", "nul .x", "x ", "x.", "a\nb", "a\x7fb", "é" * 128, "what?",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_a_name_that_is_not_a_plain_file_name_everywhere_is_refused(name):
    assert name_problem(name) is not None


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "model.fp16.safetensors", "modèle.safetensors", "a b.x", "console.x", ".hidden", "a..b"],
)
def test_a_plain_file_name_is_accepted(name):
    assert name_problem(name) is None


@given(st.text(max_size=20))
def test_an_accepted_name_never_leaves_the_folder(tmp_path_factory, name):
    if name_problem(name) is None:
        folder = tmp_path_factory.getbasetemp().resolve()
        assert folder == (folder / name).resolve().parent


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "snapshots" / "main"
    root.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "b").write_text("blob")
    (tmp_path / "elsewhere").write_text("outside")
    return root


@pytest.mark.parametrize("target", ["real", "../../blobs/b", "nothing-here"])
def test_links_may_stay_inside_the_folder_or_its_link_roots(folder, target):
    (folder / "real").write_text("x")
    (folder / "shard").symlink_to(target)
    snapshot = Snapshot(reference="x", root=folder, source="local", link_roots=(folder.parent.parent / "blobs",))
    assert folder / "shard" == inside(snapshot, "shard")


@pytest.mark.parametrize("target", ["../../elsewhere", "../../blobs/../elsewhere", "/etc/hostname", "../../blobs/b"])
def test_links_that_leave_are_refused(folder, target):
    (folder / "shard").symlink_to(target)
    with pytest.raises(FileError) as caught:
        inside(Snapshot(reference="x", root=folder, source="local"), "shard")
    assert ("IO-PATH", str(folder / "shard")) == (caught.value.code, caught.value.path)


def test_a_file_in_a_folder_that_is_a_link_out_is_refused_too(folder, tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("outside")
    (folder / "templates").symlink_to(tmp_path / "templates")
    for name in ("templates", "templates/x.jinja", "templates/absent"):
        with pytest.raises(FileError) as caught:
            inside(Snapshot(reference="x", root=folder, source="local"), name)
        assert ("IO-PATH", str(folder / name)) == (caught.value.code, caught.value.path)


@pytest.mark.parametrize(("target", "is_there"), [(None, False), ("real", True), ("gone", True), ("link", True)])
def test_an_optional_file_is_absent_only_if_there_is_nothing_of_its_name(folder, target, is_there):
    (folder / "real").write_text("x")
    if target is not None:
        (folder / "link").symlink_to(target)
    found = optional(Snapshot(reference="x", root=folder, source="local"), "link")
    assert (folder / "link" if is_there else None) == found


def test_a_folder_that_is_itself_reached_by_a_link_is_no_way_out(folder, tmp_path):
    (folder / "real").write_text("x")
    (folder / "shard").symlink_to("real")
    (tmp_path / "link").symlink_to(folder)
    assert "x" == inside(Snapshot(reference="x", root=tmp_path / "link", source="local"), "shard").read_text()
