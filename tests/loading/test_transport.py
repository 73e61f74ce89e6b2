"""Bytes of a file as they are, from a mapping or by reads; nothing lost, nothing left, and a changed file is an error."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from modelrig.checkpoint.files import identity
from modelrig.components import TensorEntry, TensorFile
from modelrig.errors import FileError
from modelrig.loading import transport
from modelrig.loading.transport import TensorFileReader, check_unchanged, drop_pages
from residue import held, mappings, open_files

PAGE = mmap.PAGESIZE
SIZE = 5 * PAGE + 100
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


def entry(offset: int = 0, nbytes: int = SIZE) -> TensorEntry:
    return TensorEntry("t", "uint8", (nbytes,), 0, offset, nbytes)


@pytest.fixture
def file(tmp_path: Path) -> TensorFile:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT.tobytes())
    return TensorFile(path.name, path, SIZE, identity(path.stat()))


@pytest.fixture
def reader(file: TensorFile) -> Iterator[TensorFileReader]:
    with TensorFileReader(file) as opened:
        yield opened


def expected(offset: int, nbytes: int) -> torch.Tensor:
    return torch.from_numpy(CONTENT[offset : offset + nbytes].copy())


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(("offset", "nbytes"), [(0, SIZE), (1, 7), (PAGE - 1, PAGE + 2), (SIZE - 1, 1), (50, 0)])
def test_views_and_reads_give_the_bytes_of_the_file(reader: TensorFileReader, offset: int, nbytes: int) -> None:
    view = reader.view(entry(offset, nbytes))
    assert view is not None
    assert torch.equal(expected(offset, nbytes), view)
    assert torch.equal(expected(offset, nbytes), reader.read(offset, torch.empty(nbytes, dtype=torch.uint8)))


def test_a_view_lies_in_the_mapping_of_the_file(reader: TensorFileReader, file: TensorFile) -> None:
    view = reader.view(entry(64, 128))
    ((first, last, _),) = mappings(file.path)
    assert first + 64 == view.data_ptr()
    assert view.data_ptr() + 128 <= last


def test_a_read_is_put_together_from_short_ones(reader: TensorFileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(transport.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:1000]], at))
    assert torch.equal(expected(3, SIZE - 3), reader.read(3, torch.empty(SIZE - 3, dtype=torch.uint8)))


def test_writing_to_a_view_does_not_reach_the_file(reader: TensorFileReader, file: TensorFile) -> None:
    reader.view(entry()).zero_()
    assert CONTENT.tobytes() == file.path.read_bytes()


def test_nothing_is_mapped_before_a_view_is_asked_for(reader: TensorFileReader, file: TensorFile) -> None:
    reader.read(0, torch.empty(10, dtype=torch.uint8))
    assert [] == mappings(file.path)


def test_a_view_outlives_its_reader_and_takes_the_mapping_with_it(file: TensorFile) -> None:
    with TensorFileReader(file) as reader:
        view = reader.view(entry(8, 8))
    reader.close()  # a second time changes nothing
    assert torch.equal(expected(8, 8), view)
    assert 1 == len(mappings(file.path))
    del view, reader
    assert ([], []) == held(file.path)


def test_files_on_a_network_are_not_mapped(file: TensorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "is_on_network", lambda path: True)
    with TensorFileReader(file) as reader:
        assert reader.view(entry()) is None
        assert torch.equal(expected(9, 99), reader.read(9, torch.empty(99, dtype=torch.uint8)))
    assert ([], []) == held(file.path)


def test_a_file_that_cannot_be_mapped_is_read(file: TensorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport._libc, "mmap", lambda *arguments: ctypes.c_void_p(-1).value)
    with TensorFileReader(file) as reader:
        assert reader.view(entry()) is None
        assert torch.equal(expected(0, 9), reader.read(0, torch.empty(9, dtype=torch.uint8)))


def test_what_the_system_cannot_read_is_named(reader: TensorFileReader, file: TensorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(transport.os, "preadv", fail)
    with pytest.raises(FileError, match="byte 7: Input/output error") as caught:
        reader.read(7, torch.empty(5, dtype=torch.uint8))
    assert ("IO-READ", str(file.path)) == (caught.value.code, caught.value.path)


def test_a_mapping_takes_no_descriptor(file: TensorFile) -> None:
    with TensorFileReader(file) as reader:
        view = reader.view(entry())
    assert ([], 1) == (open_files(file.path), len(mappings(file.path)))
    assert torch.equal(expected(0, SIZE), view)


def test_a_reader_that_is_forgotten_closes_its_file(file: TensorFile) -> None:
    reader = TensorFileReader(file)
    assert [str(file.path)] == open_files(file.path)
    del reader
    assert ([], []) == held(file.path)


def test_views_and_reads_do_not_mind_the_callers_modes(file: TensorFile) -> None:
    with torch.inference_mode(), torch.device("meta"), TensorFileReader(file) as reader:
        view = reader.view(entry(8, 8))
    assert not view.is_inference()
    assert torch.equal(expected(8, 8), view)


# ------------------------------------------------------------------------------------------------ changed files


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"x")


def rewrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b"x")
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


CHANGES = [append, rewrite, replace, lambda path: os.truncate(path, 100)]


@pytest.mark.parametrize("change", CHANGES, ids=["grown", "rewritten", "replaced by an equal one", "truncated"])
def test_a_file_that_changed_is_refused_before_and_after(file: TensorFile, change: object) -> None:
    with TensorFileReader(file):
        check_unchanged(file)
        change(file.path)
        for call in (check_unchanged, TensorFileReader):
            with pytest.raises(FileError, match="IO-CHANGED") as caught:
                call(file)
            assert str(file.path) == caught.value.path
    del caught
    assert ([], []) == held(file.path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(reader: TensorFileReader, file: TensorFile) -> None:
    os.truncate(file.path, PAGE)
    with pytest.raises(FileError, match="IO-CHANGED"):
        reader.read(0, torch.empty(SIZE, dtype=torch.uint8))
    with pytest.raises(FileError, match="IO-CHANGED"):
        reader.view(entry())


def test_a_file_without_a_known_identity_is_taken_as_it_is(file: TensorFile) -> None:
    fetched = TensorFile(file.name, file.path, file.size, None)
    append(file.path)
    check_unchanged(fetched)
    with TensorFileReader(fetched) as reader:
        assert torch.equal(expected(0, 4), reader.read(0, torch.empty(4, dtype=torch.uint8)))


# ------------------------------------------------------------------------------------------------ dropping pages


def resident_pages(tensor: torch.Tensor) -> int:
    """Pages of `tensor` that are in this process's page table."""
    first, last = tensor.data_ptr() // PAGE, -(-(tensor.data_ptr() + tensor.nbytes) // PAGE)
    with open("/proc/self/pagemap", "rb") as stream:
        stream.seek(first * 8)
        pages = np.frombuffer(stream.read((last - first) * 8), dtype=np.uint64)
    return int((pages >> np.uint64(63)).sum())


def test_dropped_pages_leave_memory_and_come_back(reader: TensorFileReader) -> None:
    view = reader.view(entry())
    view.sum()
    assert 6 == resident_pages(view)
    drop_pages(view)
    assert 1 == resident_pages(view)  # the last one is not whole
    assert torch.equal(expected(0, SIZE), view)


def test_neighbours_pages_stay(reader: TensorFileReader) -> None:
    whole = reader.view(entry())
    whole.sum()
    drop_pages(reader.view(entry(100, 3 * PAGE)))  # touches pages 0 to 3, and has 1 and 2 alone
    assert 4 == resident_pages(whole)


WRITES = {
    "in place": lambda view: view.fill_(7),
    "through data": lambda view: view.data.fill_(7),
    "through numpy": lambda view: view.numpy().fill(7),
    "one byte": lambda view: view[2 * PAGE].fill_(7),
    "through a parameter": lambda view: torch.nn.Parameter(view, requires_grad=False).data.fill_(7),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_was_written_is_never_dropped(reader: TensorFileReader, write: object) -> None:
    view = reader.view(entry())
    write(view)
    before = view.clone()
    assert 7 == before[2 * PAGE]
    drop_pages(view)
    assert torch.equal(before, view)


def test_a_neighbours_write_on_a_shared_page_stays(reader: TensorFileReader) -> None:
    left, right = reader.view(entry(0, 2 * PAGE + 10)), reader.view(entry(2 * PAGE + 10, 2 * PAGE))
    right.fill_(9)
    drop_pages(left)
    assert 9 == int(right.min())
    assert torch.equal(expected(0, 2 * PAGE + 10), left)


def test_without_word_from_the_kernel_nothing_is_dropped(reader: TensorFileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    view = reader.view(entry())
    view.sum()
    real = os.open
    monkeypatch.setattr(transport.os, "open", lambda path, *a: real("/nonexistent" if "pagemap" in str(path) else path, *a))
    drop_pages(view)
    monkeypatch.undo()
    assert 6 == resident_pages(view)


def test_other_tensors_are_left_alone(reader: TensorFileReader) -> None:
    reader.view(entry())
    ordinary = torch.arange(4 * PAGE, dtype=torch.uint8)
    before = ordinary.clone()
    drop_pages(ordinary)
    drop_pages(reader.view(entry(0, 4 * PAGE)).view(4, PAGE).T)
    assert torch.equal(before, ordinary)
