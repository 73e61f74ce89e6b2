"""Where tensors lie in a slot that whole pages of their files are read into."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from modelrig.components import TensorEntry
from modelrig.loading.filling import Wanted

GAP = 1 << 20  # bytes between tensors of a unit that are read rather than skipped

#: a tensor, its entry, and where it begins in the slot; or, with the offset in the file, the pages it is read with, and their size
Laid = tuple[Wanted, TensorEntry, int | None, int, int]


def lay_out_runs(wanted: Sequence[tuple[Wanted, TensorEntry]], offset: int) -> tuple[list[Laid], int]:
    """Places in a slot from `offset` on such that whole pages of the files can be read into it, and where they end."""
    laid: list[Laid] = []
    page = mmap.PAGESIZE
    group: list[tuple[Wanted, TensorEntry]] = []

    def close(offset: int) -> int:
        if not group:
            return offset
        base = -(-offset // page) * page
        first = group[0][1].offset // page * page
        end = max(entry.offset + entry.nbytes for _, entry in group)
        length = -(-(end - first) // page) * page
        laid.append((*group[0], first, base, length))
        laid.extend((one, entry, None, base + entry.offset - first, 0) for one, entry in group)
        group.clear()
        return base + length

    for one, entry in sorted(wanted, key=lambda item: (item[1].file, item[1].offset)):
        if group and (group[-1][1].file != entry.file or entry.offset - group[-1][1].offset - group[-1][1].nbytes > GAP):
            offset = close(offset)
        group.append((one, entry))
    return laid, close(offset)
