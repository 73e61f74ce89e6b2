"""Tensors that are put together: mapped part by part where pages allow it, read elsewhere, and the same values either way."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fillers import CPU, Reader, wanted, write
from modelrig.checkpoint import in_place
from modelrig.checkpoint.in_place import consecutive
from modelrig.components import Catalog, Part
from modelrig.errors import FileError
from modelrig.loading import transport
from modelrig.loading.filling import Filler, Wanted
from residue import held, mappings, resident_bytes

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
EXPERTS, ROWS, COLUMNS = 5, 24, 512  # 12 pages each in float32


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "PART_BYTES", 1)


@pytest.fixture
def experts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{expert}.{name}": torch.randn(ROWS, COLUMNS, generator=generator) for expert in range(EXPERTS) for name in ("w1", "w3")
    }


def stack(name: str, tensors: list[str], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Wanted:
    """Tensors of `shape`, one on another."""
    full = tuple((0, size) for size in shape)
    parts = [Part(tensor, shape, into=((number, number + 1), *full)) for number, tensor in enumerate(tensors)]
    return Wanted(name, (len(tensors), *shape), dtype, CPU, tuple(parts))


def gate_up() -> Wanted:
    """w1 and w3 of each expert beside each other, stacked."""
    parts = [
        Part(f"{expert}.{name}", (ROWS, COLUMNS), into=((expert, expert + 1), (first, first + ROWS), (0, COLUMNS)))
        for expert in range(EXPERTS)
        for name, first in (("w1", 0), ("w3", ROWS))
    ]
    return Wanted("gate_up", (EXPERTS, 2 * ROWS, COLUMNS), torch.float32, CPU, tuple(parts))


def loaded(catalog: Catalog, *all_wanted: Wanted, progress: Any = None) -> tuple[list[torch.Tensor], int]:
    """The tensors, and the bytes that were mapped."""
    with Filler(catalog, Reader()) as filler:
        made = filler.fill(all_wanted, progress)
        return [made[one.name] for one in all_wanted], filler.tally.mapped_bytes


@pytest.mark.parametrize("before", [0, 1, 63, 64, PAGE - 64, PAGE])
def test_parts_of_whole_pages_are_mapped_wherever_they_begin(
    tmp_path: Path, small_parts: None, experts: dict[str, torch.Tensor], before: int
) -> None:
    catalog = write(tmp_path, {"norm": torch.zeros(before, dtype=torch.uint8)} | experts)
    calls: list[tuple[int, int]] = []
    [made], mapped = loaded(catalog, gate_up(), progress=lambda done, total: calls.append((done, total)))
    expected = torch.stack([torch.cat([experts[f"{number}.w1"], experts[f"{number}.w3"]]) for number in range(EXPERTS)])
    assert torch.equal(expected, made)
    assert (0, made.nbytes) == (made.storage_offset(), made.untyped_storage().nbytes())  # as writers of files expect it
    assert expected.nbytes - 10 * PAGE <= mapped <= expected.nbytes
    assert calls[-1] == (expected.nbytes, expected.nbytes)
    assert mappings(tmp_path)
    del made
    assert ([], []) == held(tmp_path)


def test_a_file_that_begins_elsewhere_is_read(tmp_path: Path, small_parts: None, experts: dict[str, torch.Tensor]) -> None:
    names = [*experts]
    first, second = names[:7], names[7:]
    shift = {"shift": torch.zeros(64, dtype=torch.uint8)}
    catalog = write(tmp_path, {name: experts[name] for name in first}, shift | {name: experts[name] for name in second})
    [made], mapped = loaded(catalog, stack("all", names, (ROWS, COLUMNS)))
    assert torch.equal(torch.stack([*experts.values()]), made)
    assert mapped == 7 * ROWS * COLUMNS * 4
    assert {str(tmp_path / "0.bytes")} == {path for _, _, path in mappings(tmp_path)}


@given(
    rows=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    columns=st.sampled_from([1, 3, 512, 1024, 2048]),
    gaps=st.lists(st.sampled_from([0, 64, PAGE - 64, PAGE]), min_size=6, max_size=6),
    files=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    dim=st.integers(0, 1),
)
def test_what_is_joined_is_what_torch_joins(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[int],
    columns: int,
    gaps: list[int],
    files: int,
    dtype: torch.dtype,
    dim: int,
) -> None:
    folder = tmp_path_factory.mktemp("joined")
    tensors = {}
    stored: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for number, (count, gap) in enumerate(zip(rows, gaps, strict=False)):
        values = torch.randint(0, 2, (count, columns), generator=torch.Generator().manual_seed(number)).to(dtype)
        tensors[str(number)] = values if dim == 0 else values.T.contiguous()
        stored[number % files][f"gap {number}"] = torch.zeros(gap, dtype=torch.uint8)
        stored[number % files][str(number)] = tensors[str(number)]
    expected = torch.cat([*tensors.values()], dim)
    parts, first = [], 0
    for name, tensor in tensors.items():
        span = (first, first + tensor.shape[dim])
        first = span[1]
        other = (0, columns)
        parts.append(Part(name, tuple(tensor.shape), into=(span, other) if dim == 0 else (other, span)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "PART_BYTES", 1)
        [made], _ = loaded(write(folder, *stored), wanted("joined", expected, *parts))
    assert made.dtype == dtype and torch.equal(expected, made)


def test_it_takes_no_memory_until_it_is_written_to(tmp_path: Path) -> None:
    tensors = {str(number): torch.full((8, MIB // 4), float(number)) for number in range(8)}
    catalog = write(tmp_path, tensors)
    before = resident_bytes("RssAnon")
    [made], mapped = loaded(catalog, stack("all", [*tensors], (8, MIB // 4)))
    assert 64 * MIB == mapped
    assert 28 * 8 * MIB // 4 == made[:, :, :].sum(dtype=torch.float64)
    assert resident_bytes("RssAnon") - before < 4 * MIB
    made[3] = 7.0
    assert resident_bytes("RssAnon") - before > 8 * MIB - 1
    [again], _ = loaded(catalog, stack("all", [*tensors], (8, MIB // 4)))
    assert (3.0, 7.0) == (again[3, 1, 1].item(), made[3, 1, 1].item())


def test_small_parts_are_read(tmp_path: Path, experts: dict[str, torch.Tensor]) -> None:
    catalog = write(tmp_path, experts)
    [made], mapped = loaded(catalog, stack("all", [*experts], (ROWS, COLUMNS)))
    assert torch.equal(torch.stack([*experts.values()]), made)
    assert ([], 0) == (mappings(tmp_path), mapped)


@pytest.mark.parametrize("left", [None, 0, 3], ids=["a network", "no mapping left", "some mappings left"])
def test_what_cannot_be_mapped_is_read(
    tmp_path: Path, small_parts: None, experts: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, left: int | None
) -> None:
    gc.collect()
    if left is None:
        monkeypatch.setattr(transport, "is_on_network", lambda path: True)
    else:
        used = sum(transport._mapped_over.values())
        monkeypatch.setattr(transport, "_max_mapped_over", lambda: used + left)
    [made], mapped = loaded(write(tmp_path, experts), stack("all", [*experts], (ROWS, COLUMNS)))
    assert torch.equal(torch.stack([*experts.values()]), made)
    assert mapped == (left or 0) * ROWS * COLUMNS * 4


def test_a_system_that_refuses_leaves_no_hole(
    tmp_path: Path, small_parts: None, experts: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = transport._libc, []

    class Refusing:
        munmap, madvise = real.munmap, real.madvise

        @staticmethod
        def mmap(address: Any, size: int, access: int, flags: int, descriptor: int, offset: int) -> Any:
            if descriptor < 0 or address is None:
                return real.mmap(address, size, access, flags, descriptor, offset)
            real.munmap(address, size)  # what a failed one may have done
            refused.append(address)
            return transport._FAILED

    monkeypatch.setattr(transport, "_libc", Refusing)
    [made], mapped = loaded(write(tmp_path, experts), stack("all", [*experts], (ROWS, COLUMNS)))
    assert torch.equal(torch.stack([*experts.values()]), made)
    assert 0 == mapped and 10 == len(refused)


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path, small_parts: None, experts: dict[str, torch.Tensor]) -> None:
    catalog = write(tmp_path, experts)
    with Filler(catalog, Reader()) as filler:
        filler.file(0)  # is open when it changes
        os.truncate(tmp_path / "0.bytes", catalog.files[0].size // 2)
        with pytest.raises(FileError, match="IO-CHANGED"):
            filler.fill([stack("all", [*experts], (ROWS, COLUMNS))])
    assert ([], []) == held(tmp_path)


def test_mappings_are_counted_as_long_as_they_live(tmp_path: Path, small_parts: None, experts: dict[str, torch.Tensor]) -> None:
    gc.collect()
    before = sum(transport._mapped_over.values())
    [made], _ = loaded(write(tmp_path, experts), stack("all", [*experts], (ROWS, COLUMNS)))
    assert 10 == sum(transport._mapped_over.values()) - before
    row = made[2]
    del made
    gc.collect()
    assert 10 == sum(transport._mapped_over.values()) - before
    del row
    gc.collect()
    assert before == sum(transport._mapped_over.values())


@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple),
    data=st.data(),
)
def test_consecutive_elements_are_found(shape: tuple[int, ...], data: st.DataObject) -> None:
    region = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        region.append((start, data.draw(st.integers(start + 1, size))))
    view = torch.arange(torch.Size(shape).numel()).view(shape)[tuple(slice(*pair) for pair in region)].reshape(-1)
    first = int(view[0])
    is_run = bool((view == torch.arange(first, first + len(view))).all())
    assert (first if is_run else None) == consecutive(shape, tuple(region))
