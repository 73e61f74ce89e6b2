"""Stored tensors into tensors: each value where whole-tensor computation puts it, in the memory they take and little more."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from fillers import CPU, Reader, filled, peak_bytes, wanted, write
from modelrig.components import Part, TensorEntry
from modelrig.errors import FileError, LoadError
from modelrig.loading import filling, pieces, transport
from modelrig.loading.filling import Filler, Wanted
from residue import held, mappings, open_files, resident_bytes

MIB = 1 << 20
STORED = {
    "matrix": torch.randn(37, 53, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(64, 33, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "column": torch.randn(40, 30, generator=torch.Generator().manual_seed(2)).T,
    "cube": torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(3)).permute(2, 0, 1),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "nothing": torch.zeros(0, 7),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also small tensors are read in pieces and by several threads."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)
    monkeypatch.setattr(filling, "PIECE_BYTES", 200)


def same(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    return expected.dtype == actual.dtype and expected.shape == actual.shape and torch.equal(expected, actual)


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("way", ["mapped", "on_network"])
@pytest.mark.parametrize("small", [True, False], ids=["in tiny pieces", "whole"])
def test_tensors_are_what_is_stored(tmp_path: Path, request: pytest.FixtureRequest, way: str, small: bool) -> None:
    for fixture in ([way] if way == "on_network" else []) + (["tiny_pieces"] if small else []):
        request.getfixturevalue(fixture)
    catalog = write(tmp_path, STORED, {"second": STORED["matrix"] * 2})
    expected = STORED | {"second": STORED["matrix"] * 2}
    with Filler(catalog, Reader()) as filler:
        tensors = filler.fill([wanted(name, tensor) for name, tensor in expected.items()])
    assert all(same(tensor, tensors[name]) for name, tensor in expected.items())
    assert (way == "mapped") == bool(mappings(tmp_path))
    assert [] == open_files(tmp_path)


@pytest.mark.parametrize("way", ["mapped", "on_network"])
def test_floats_are_cast_as_torch_casts_them(tmp_path: Path, request: pytest.FixtureRequest, tiny_pieces: None, way: str) -> None:
    if way == "on_network":
        request.getfixturevalue(way)
    catalog = write(tmp_path, STORED)
    floats = {name: tensor for name, tensor in STORED.items() if tensor.is_floating_point()}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        with Filler(catalog, Reader()) as filler:
            tensors = filler.fill([wanted(name, tensor, dtype=dtype) for name, tensor in floats.items()])
        assert all(same(tensor.to(dtype), tensors[name]) for name, tensor in floats.items())


PARTS = {
    "stacked": ("matrix", (3, 37, 53), {"into": ((1, 2), (0, 37), (0, 53))}),
    "transposed": ("matrix", (53, 37), {"axes": (37, 53), "order": (1, 0)}),
    "a column block": ("matrix", (37, 9), {"taken": ((0, 37), (20, 29))}),
    "beside another": ("matrix", (37, 60), {"into": ((0, 37), (7, 60))}),
    "rope": ("half", (64, 33), {"axes": (4, 8, 2, 33), "order": (0, 2, 1, 3)}),
    "stacked and transposed": ("half", (1, 33, 64), {"axes": (1, 64, 33), "order": (0, 2, 1), "into": ((0, 1), (0, 33), (0, 64))}),
    "strided, a block": ("column", (10, 8), {"taken": ((5, 15), (3, 11))}),
    "strided, transposed": ("column", (40, 30), {"axes": (30, 40), "order": (1, 0)}),
    "strided, split and cut": (
        "cube",
        (2, 3, 2, 4),
        {"taken": ((0, 6), (1, 3), (0, 4)), "axes": (2, 3, 2, 4), "order": (0, 1, 2, 3)},
    ),
    "one row of a vector": ("scalar", (2,), {"into": ((1, 2),)}),
}


@pytest.mark.parametrize("cast", [False, True], ids=["", "cast"])
@pytest.mark.parametrize(("name", "shape", "how"), PARTS.values(), ids=PARTS)
def test_parts_are_put_in_their_places_and_nowhere_else(
    tmp_path: Path, tiny_pieces: None, name: str, shape: tuple[int, ...], how: dict[str, Any], cast: bool
) -> None:
    stored = STORED[name]
    catalog = write(tmp_path, STORED)
    part = Part(name, tuple(stored.shape), **how)
    buffer = torch.full(shape, 5, dtype=torch.float64 if cast and stored.is_floating_point() else stored.dtype)
    one = Wanted("made", shape, buffer.dtype, CPU, (part,), buffer)
    with Filler(catalog, Reader()) as filler:
        made = filler.fill([one])["made"]
    assert made is buffer
    assert same(filled(part, stored, shape, 5).to(buffer.dtype), made)


def test_a_stored_2_is_true(tmp_path: Path, tiny_pieces: None) -> None:
    catalog = write(tmp_path, {"b": torch.tensor([0, 1, 2, 255], dtype=torch.uint8)})
    entries = {"b": attrs.evolve(catalog.entries["b"], dtype="bool")}
    like = torch.zeros(4, dtype=torch.bool)
    for buffer in (None, torch.zeros(4, dtype=torch.bool)):
        with Filler(attrs.evolve(catalog, entries=entries), Reader()) as filler:
            made = filler.fill([wanted("b", like, buffer=buffer)])["b"]
        assert [0, 1, 1, 1] == made.view(torch.uint8).tolist()


def test_buffers_of_another_layout_and_in_inference_mode_are_filled(tmp_path: Path, tiny_pieces: None) -> None:
    catalog = write(tmp_path, STORED)
    with torch.inference_mode():
        buffers = [torch.zeros(37, 53), torch.zeros(53, 37).T, torch.zeros(37, 60, dtype=torch.float64)[:, 7:]]
    for buffer in [*buffers, torch.zeros(53, 37).T]:
        with Filler(catalog, Reader()) as filler:
            filler.fill([wanted("matrix", STORED["matrix"], dtype=buffer.dtype, buffer=buffer)])
        assert same(STORED["matrix"].to(buffer.dtype), buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_callers_modes_reach_no_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    catalog = write(tmp_path, STORED)
    with torch.inference_mode(), torch.device("meta"), Filler(catalog, Reader()) as filler:
        made = filler.fill([wanted(name, STORED[name], dtype=dtype) for name in ("matrix", "column", "nothing")])
    assert not any(tensor.is_inference() or tensor.is_meta or tensor.requires_grad for tensor in made.values())
    assert same(STORED["matrix"].to(dtype), made["matrix"])
    made["matrix"].requires_grad_().sum().backward()  # and they can be trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_stored_tensor_may_fill_several(tmp_path: Path, tiny_pieces: None, dtype: torch.dtype) -> None:
    stored = STORED["matrix"]
    top = Part("matrix", (37, 53), taken=((0, 20), (0, 53)))
    rest = Part("matrix", (37, 53), taken=((20, 37), (0, 53)))
    calls: list[tuple[int, int]] = []
    with Filler(write(tmp_path, STORED), Reader()) as filler:
        made = filler.fill(
            [wanted("top", stored[:20], top, dtype=dtype), wanted("rest", stored[20:], rest, dtype=dtype)],
            lambda done, total: calls.append((done, total)),
        )
        mapped = stored.nbytes if dtype == stored.dtype else 0  # rows lie one after the other
        assert (mapped, stored.nbytes - mapped) == (filler.tally.mapped_bytes, filler.tally.copied_bytes)
    assert same(stored[:20].to(dtype), made["top"]) and same(stored[20:].to(dtype), made["rest"])
    assert (stored.nbytes, stored.nbytes) == calls[-1]


def test_tensors_of_the_same_bytes_share_no_memory(tmp_path: Path) -> None:
    stored = STORED["matrix"]
    regions = {"rows": (3, 20), "the same": (3, 20), "some of them": (19, 21), "others": (20, 30), "all": (0, 37)}
    parts = {name: Part("matrix", (37, 53), taken=(rows, (0, 53))) for name, rows in regions.items()}
    with Filler(write(tmp_path, STORED), Reader()) as filler:
        made = filler.fill([wanted(name, stored[slice(*regions[name])], part) for name, part in parts.items()])
        assert (17 + 10) * 53 * 4 == filler.tally.mapped_bytes
    for name, tensor in made.items():
        tensor.zero_()
        for other in made.keys() - {name}:
            assert same(stored[slice(*regions[other])], made[other]), (name, other)
        tensor.copy_(stored[slice(*regions[name])])


def test_what_is_made_of_nothing_is_there(tmp_path: Path) -> None:
    one = Wanted("empty", (0, 3), torch.float32, CPU, ())
    with Filler(write(tmp_path, STORED), Reader()) as filler:
        assert (0, 3) == tuple(filler.fill([one])["empty"].shape)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("dtype", ["float4_e2m1fn_x2", "float6_e2m3", "float6_e3m2"])
def test_dtypes_with_several_values_in_a_byte_are_refused(tmp_path: Path, dtype: str) -> None:
    catalog = write(tmp_path, {"w": torch.zeros(12, dtype=torch.uint8)})
    catalog = attrs.evolve(catalog, entries={"w": TensorEntry("w", dtype, (16,), 0, 0, 12)})
    with Filler(catalog, Reader()) as filler, pytest.raises(LoadError, match="only a quantizer") as caught:
        filler.fill([wanted("w", torch.zeros(16))])
    assert ("LD-DTYPE", str(tmp_path / "0.bytes"), "w") == (caught.value.code, caught.value.path, caught.value.locus)


DIFFERENT = [(torch.int64, torch.float32), (torch.float32, torch.int64), (torch.int32, torch.int64), (torch.bool, torch.uint8)]


@pytest.mark.parametrize(("stored", "asked"), DIFFERENT)
def test_what_is_no_float_stays_what_it_is(tmp_path: Path, stored: torch.dtype, asked: torch.dtype) -> None:
    catalog = write(tmp_path, {"w": torch.zeros(3, dtype=stored)})
    with Filler(catalog, Reader()) as filler, pytest.raises(LoadError, match="such values are not cast") as caught:
        filler.fill([wanted("w", torch.zeros(3, dtype=asked))])
    assert ("LD-DTYPE", "w") == (caught.value.code, caught.value.locus)


# ------------------------------------------------------------------------------------------------ what it takes


def large(folder: Path, count: int = 12) -> Any:
    """`count` matrices of 4 MiB, bfloat16."""
    return write(folder, {f"e.{number}": torch.full((1024, 2048), number, dtype=torch.bfloat16) for number in range(count)})


@pytest.mark.parametrize("way", ["mapped", "on_network"])
def test_a_cast_takes_what_it_makes_and_little_more(tmp_path: Path, request: pytest.FixtureRequest, way: str) -> None:
    if way == "on_network":
        request.getfixturevalue(way)
    catalog = large(tmp_path)
    made: dict[str, torch.Tensor] = {}

    def load() -> None:
        with Filler(catalog, Reader()) as filler:
            made.update(filler.fill([wanted(name, torch.empty(1024, 2048, device="meta")) for name in catalog.entries]))

    load()
    made.clear()  # threads and allocators have what they keep
    assert peak_bytes(load) < 96 * MIB + 14 * MIB
    assert all(number == made[f"e.{number}"][1023, 2047] for number in range(12))


@pytest.mark.parametrize("how", ["stacked", "stacked and transposed", "concatenated by columns"])
def test_parts_of_one_tensor_take_that_tensor_and_little_more(tmp_path: Path, how: str) -> None:
    catalog = large(tmp_path)
    parts = []
    for number in range(12):
        shape = (1024, 2048)
        if how == "stacked":
            parts.append(Part(f"e.{number}", shape, into=((number, number + 1), (0, 1024), (0, 2048))))
        elif how == "stacked and transposed":
            into = ((number, number + 1), (0, 2048), (0, 1024))
            parts.append(Part(f"e.{number}", shape, axes=(1, *shape), order=(0, 2, 1), into=into))
        else:
            parts.append(Part(f"e.{number}", shape, into=((0, 1024), (2048 * number, 2048 * (number + 1)))))
    final = {"stacked": (12, 1024, 2048), "stacked and transposed": (12, 2048, 1024)}.get(how, (1024, 12 * 2048))
    one = Wanted("all", final, torch.bfloat16, CPU, tuple(parts))
    made: list[torch.Tensor] = []

    def load() -> None:
        with Filler(catalog, Reader()) as filler:
            made.append(filler.fill([one])["all"])

    load()
    made.clear()
    assert peak_bytes(load) < 48 * MIB + 14 * MIB
    by_expert = made[0].unbind(0) if made[0].dim() == 3 else made[0].split(2048, 1)
    assert [(number, number) for number in range(12)] == [(int(one[0, 0]), int(one[-1, -1])) for one in by_expert]


def test_files_are_as_they_were(tmp_path: Path, tiny_pieces: None) -> None:
    catalog = write(tmp_path, STORED)
    before = [(path.read_bytes(), path.stat()) for path in sorted(tmp_path.iterdir())]
    with Filler(catalog, Reader()) as filler:
        made = filler.fill([wanted(name, tensor) for name, tensor in STORED.items()])
        filler.check_unchanged()
    made["matrix"].zero_()
    for (content, status), path in zip(before, sorted(tmp_path.iterdir()), strict=True):
        after = path.stat()
        assert content == path.read_bytes()
        assert (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino) == (
            after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_ino,
        )  # fmt: skip


@pytest.mark.parametrize("shape", ["as they are", "cast", "stacked"])
def test_twenty_thousand_small_tensors_cost_few_calls_each(tmp_path: Path, shape: str) -> None:
    """Time would be the machine's; calls are ours. The reading threads count too."""
    stored = {f"layers.{number}.w": torch.zeros(8, dtype=torch.bfloat16) for number in range(20_000)}
    catalog = write(tmp_path, stored)
    like = torch.zeros(8, dtype=torch.float32 if shape == "cast" else torch.bfloat16)
    if shape == "stacked":
        parts = [Part(name, (8,), into=((number, number + 1), (0, 8))) for number, name in enumerate(stored)]
        everything = [Wanted("all", (20_000, 8), torch.bfloat16, CPU, tuple(parts))]
    else:
        everything = [wanted(name, like) for name in stored]
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    with Filler(catalog, Reader()) as filler:
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            filler.fill(everything)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    assert count / len(stored) < {"as they are": 40, "cast": 60, "stacked": 90}[shape]


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, len(os.listdir("/proc/self/fd")) + 100), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("keep_open", [False, True], ids=["resident", "paged"])
def test_two_thousand_shards_need_few_descriptors(tmp_path: Path, few_descriptors: None, keep_open: bool) -> None:
    stored = [{f"w.{number}": torch.full((4,), float(number))} for number in range(2_000)]
    catalog = write(tmp_path, *stored)
    everything = [wanted(f"w.{number}", torch.zeros(4)) for number in range(2_000)]
    with Filler(catalog, Reader(), keep_open=keep_open) as filler:
        made = {one.name: filler.view(one) for one in everything} if keep_open else filler.fill(everything)
        assert 2_000 == len(mappings(tmp_path))
        cast = filler.fill([wanted(f"w.{number}", torch.zeros(4, dtype=torch.float64)) for number in range(0, 2_000, 40)])
    assert all(number == made[f"w.{number}"][3] for number in range(2_000))
    assert all(number == cast[f"w.{number}"][3] for number in range(0, 2_000, 40))


# ------------------------------------------------------------------------------------------------ threads


def test_reads_from_a_slow_file_system_overlap(tmp_path: Path, on_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read waits until another has begun: one after the other, they would never end."""
    catalog = large(tmp_path, 4)
    real, meeting = os.preadv, threading.Barrier(4)

    def slowly(*arguments: Any) -> int:
        meeting.wait(60)
        return real(*arguments)

    monkeypatch.setattr(transport.os, "preadv", slowly)
    like = torch.empty(1024, 2048, dtype=torch.bfloat16, device="meta")
    with Filler(catalog, Reader()) as filler:
        made = filler.fill([wanted(name, like) for name in catalog.entries])
    assert all(number == made[f"e.{number}"].max() for number in range(4))


class Failing(Reader):
    """Fails at one tensor, while the other threads are busy."""

    def __init__(self, name: str) -> None:
        self.name, self.decoded = name, 0

    def decode(self, data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
        self.decoded += 1
        if entry.name == self.name:
            raise ZeroDivisionError("made up")
        time.sleep(0.001)
        return Reader.decode(data, entry)


def test_an_error_in_one_thread_ends_all_and_is_the_error(tmp_path: Path, tiny_pieces: None) -> None:
    stored = {f"w.{number}": torch.zeros(25) for number in range(3_000)}
    catalog = write(tmp_path, stored)
    reader = Failing("w.100")
    with Filler(catalog, reader) as filler, pytest.raises(ZeroDivisionError, match="made up"):
        filler.fill([wanted(name, tensor, dtype=torch.float64) for name, tensor in stored.items()])
    assert reader.decoded < 1_000  # the rest was not read
    assert [] == [thread for thread in threading.enumerate() if "modelrig" in thread.name]
    assert ([], []) == held(tmp_path)


def test_a_filler_goes_on_after_an_error(tmp_path: Path, tiny_pieces: None) -> None:
    stored = {f"w.{number}": torch.full((25,), float(number)) for number in range(300)}
    catalog = write(tmp_path, stored)
    everything = [wanted(name, tensor, dtype=torch.float64) for name, tensor in stored.items()]
    with Filler(catalog, Reader()) as filler:
        with pytest.raises(KeyboardInterrupt):
            filler.fill(everything, raising)
        made = filler.fill(everything)
    assert all(number == made[f"w.{number}"][0] for number in range(300))


def raising(done: int, total: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_interruption_frees_memory_threads_and_files(tmp_path: Path, on_network: None, dtype: torch.dtype) -> None:
    catalog = large(tmp_path)
    like = torch.empty(1024, 2048, dtype=dtype, device="meta")
    everything = [wanted(name, like) for name in catalog.entries]
    error: BaseException | None = None

    def load() -> None:
        nonlocal error
        with Filler(catalog, Reader()) as filler:
            try:
                filler.fill(everything, raising)
            except KeyboardInterrupt as caught:
                error = caught.with_traceback(None)

    load()
    before = anonymous_bytes()
    load()
    assert isinstance(error, KeyboardInterrupt)
    assert anonymous_bytes() - before < 8 * MIB
    assert [] == [thread for thread in threading.enumerate() if "modelrig" in thread.name]
    assert ([], []) == held(tmp_path)


def anonymous_bytes() -> int:
    gc.collect()
    return resident_bytes("RssAnon")


def test_a_file_that_ends_early_is_named_from_a_thread_too(tmp_path: Path, on_network: None, tiny_pieces: None) -> None:
    catalog = write(tmp_path, STORED)

    def cut(done: int, total: int) -> None:
        os.truncate(tmp_path / "0.bytes", 4_000)

    everything = [wanted(name, tensor) for name, tensor in STORED.items()] + [
        wanted(f"{name}.again", tensor, Part(name, tuple(tensor.shape)), may_view=False) for name, tensor in STORED.items()
    ]
    with Filler(catalog, Reader()) as filler:
        cut(0, 0)
        with pytest.raises(FileError, match="IO-CHANGED") as caught:
            filler.fill(everything)
    assert str(tmp_path / "0.bytes") == caught.value.path


def test_files_opened_by_several_threads_at_once_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = write(tmp_path, STORED)
    filler = Filler(catalog, Reader(), keep_open=True)
    start, found = threading.Barrier(8), []

    def ask() -> None:
        start.wait(60)
        found.append(filler.file(0))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 == len(set(map(id, found)))
    assert 1 == len(open_files(tmp_path))
    filler.close()


# ------------------------------------------------------------------------------------------------ what the system is asked for


def test_the_system_is_told_what_will_be_read_and_of_nothing_else(
    tmp_path: Path, tiny_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "AHEAD_BYTES", 1000)
    monkeypatch.setattr(filling, "SMALL_BYTES", 1)  # several threads, not one call
    catalog = write(tmp_path, STORED)
    said: list[tuple[str, int, int]] = []
    announce, read = transport.TensorFileReader.announce, transport.TensorFileReader.read

    def announced(file: transport.TensorFileReader, offset: int, size: int) -> None:
        said.append(("announced", offset, offset + size))
        announce(file, offset, size)

    def reads(file: transport.TensorFileReader, offset: int, buffer: torch.Tensor) -> torch.Tensor:
        said.append(("read", offset, offset + buffer.numel()))
        return read(file, offset, buffer)

    monkeypatch.setattr(transport.TensorFileReader, "announce", announced)
    monkeypatch.setattr(transport.TensorFileReader, "read", reads)
    names = ("matrix", "half")  # what lies behind them is not wanted
    with Filler(catalog, Reader()) as filler:
        filler.fill([wanted(name, STORED[name], dtype=torch.float64) for name in names])
    told: list[tuple[int, int]] = []
    for what, start, stop in said:
        if what == "announced":
            told.append((start, stop))
        else:
            assert any(begin <= start and stop <= end for begin, end in told), "read before it was announced"
    entries = [catalog.entries[name] for name in names]
    assert sorted(told) == told
    assert sum(entry.nbytes for entry in entries) == sum(stop - start for start, stop in told)
    assert all(any(one.offset <= start and stop <= one.offset + one.nbytes for one in entries) for start, stop in told)
    first_read = next(number for number, (what, _, _) in enumerate(said) if what == "read")
    assert said[first_read - 1][2] <= entries[0].offset + 1000 + 3 * 200  # not all of it at once


@pytest.mark.parametrize("slow", [True, False])
def test_huge_pages_are_given_up_where_they_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    asked: list[bool] = []

    def populate(memory: torch.Tensor, *, huge: bool = False) -> None:
        asked.append(huge)
        if huge and slow:
            time.sleep(0.03)

    monkeypatch.setattr(filling, "populate_pages", populate)
    monkeypatch.setattr(filling, "_SMALL_PAGES_SECONDS", 1 / 4e9 if slow else 1e-6)  # seconds a byte that no machine needs
    stored = torch.randn(1024, 8192, generator=torch.Generator().manual_seed(5)).bfloat16()
    catalog = write(tmp_path, {"large": stored})
    with Filler(catalog, Reader()) as filler:
        made = filler.fill([wanted("large", stored, dtype=torch.float32)])["large"]
    assert torch.equal(stored.float(), made)
    assert 16 == len(asked)
    assert asked[0] is True
    assert sum(asked) <= filling.READERS if slow else all(asked)
