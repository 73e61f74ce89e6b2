"""Files are opened without surprises, and what was opened is what is described."""

import os
import threading

import pytest

from modelrig.checkpoint.files import identity, open_regular, read_at
from modelrig.errors import FileError


def test_a_descriptor_and_its_status_belong_to_the_same_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with open_regular(path) as (descriptor, status):
        other = tmp_path / "y"
        other.write_bytes(b"newer")
        other.rename(path)
        assert (3, b"old") == (status.st_size, read_at(descriptor, 9, 0, path))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("change", ["rewritten", "replaced", "cut"])
def test_a_file_that_changed_has_another_identity(tmp_path, change):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    os.utime(path, ns=(1, 1))
    before = identity(path.stat())
    if change == "rewritten":
        path.write_bytes(b"new")
    elif change == "replaced":
        (tmp_path / "y").write_bytes(b"new")
        os.utime(tmp_path / "y", ns=(1, 1))
        (tmp_path / "y").rename(path)
    else:
        os.truncate(path, 1)
    assert before != identity(path.stat())


@pytest.mark.parametrize(("count", "offset", "expected"), [(3, 0, b"abc"), (3, 4, b"ef"), (0, 0, b""), (5, 99, b"")])
def test_reading_stops_at_the_end_of_the_file(tmp_path, count, offset, expected):
    path = tmp_path / "x"
    path.write_bytes(b"abcdef")
    with open_regular(path) as (descriptor, _):
        assert expected == read_at(descriptor, count, offset, path)


def test_opening_a_pipe_waits_for_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused = []

    def attempt():
        try:
            with open_regular(tmp_path / "pipe"):
                pass
        except FileError as error:
            refused.append(error.code)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert ["IO-TYPE"] == refused


def test_a_pipe_put_in_the_files_place_at_the_last_moment_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"regular")
    really_open = os.open

    def exchange(name, flags, *more, **options):
        path.unlink()
        os.mkfifo(path)
        return really_open(name, flags, *more, **options)

    monkeypatch.setattr("modelrig.checkpoint.files.os.open", exchange)
    with pytest.raises(FileError) as caught, open_regular(path):
        pass
    assert "IO-TYPE" == caught.value.code


def test_a_system_call_that_fails_is_told_with_file_and_offset(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(FileError) as caught:
            read_at(descriptor, 3, 1, path)
    finally:
        os.close(descriptor)
    assert ("IO-READ", str(path)) == (caught.value.code, caught.value.path)
    assert "at byte 1" in caught.value.reason
