"""pytorch_bin: the files of torch.save, catalogued without torch and without running the pickle in them, and written likewise.

A file is a zip archive of stored records: `data.pkl` describes the tensors, `data/<key>` are the bytes of their storages. What
is no dense tensor in a dict by name is refused: this format reads weights, not whatever else a pickle can say.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelrig.checkpoint.catalog import catalog_sharded, catalog_single, file_names
from modelrig.checkpoint.files import identity, open_regular, read_at
from modelrig.checkpoint.headers import Header
from modelrig.checkpoint.layout import FileNames
from modelrig.components import Catalog, Snapshot, StoredTensor
from modelrig.errors import FormatError
from modelrig_plugins.formats.bin_tensors import entries_of
from modelrig_plugins.formats.bin_writer import archive_bytes, write_archive
from modelrig_plugins.formats.pickle_scan import scan
from modelrig_plugins.formats.zip_scan import layer_of, read_records

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = "pytorch_bin"
PICKLE_BYTES, PICKLE_BYTES_PER_RECORD = 1 << 22, 1 << 9  # the most a pickle may have; torch.save writes 100 to 250 for a tensor
FILES = FileNames("pytorch_model", ".bin")
#: what trainers leave beside the weights under the same suffix; never opened
NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin", "sampler.bin"})


def first_file(names: Collection[str], variant: str | None = None) -> str | None:
    """Where a folder with these files is read from: `pytorch_model.bin`, else the index, else the only .bin file with weights."""
    return FILES.first([name for name in names if name not in NOT_WEIGHTS], variant)


class PytorchBinPlanner:
    files = FILES
    stores_aliases = True

    @staticmethod
    def claims(snapshot: Snapshot) -> str | None:
        """The file it would start from, or None."""
        return first_file(file_names(snapshot), snapshot.variant)

    @staticmethod
    def catalog(snapshot: Snapshot) -> Catalog:
        """Every tensor with its verified byte range. Raises `FileError`, `FormatError` (PK-*, ZP-*) and `IndexFileError`."""
        names = [name for name in file_names(snapshot) if name not in NOT_WEIGHTS]
        index = FILES.index(snapshot.variant)
        first = first_file(names, snapshot.variant) or FILES.single(snapshot.variant)
        if first == index:
            return catalog_sharded(snapshot, index, format=NAME, suffix=FILES.suffix, read_header=read_header)
        others = [name for name in names if name.endswith(FILES.suffix) and name != first]
        notes = [f"{first} is used; {name} beside it is not" for name in (index, *others) if name in names]
        return catalog_single(snapshot, first, format=NAME, read_header=read_header, notes=notes)

    @staticmethod
    def size(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> int:  # noqa: ARG004
        """Bytes of the file that `write` makes. Raises `FormatError`: PK-KEY, PK-LAYOUT."""
        return archive_bytes(tensors)

    @staticmethod
    def write(
        tensors: Sequence[StoredTensor],
        metadata: Mapping[str, str],  # noqa: ARG004
        read: Callable[[StoredTensor], Iterable[Buffer]],
        write: Callable[[Buffer], None],
    ) -> None:
        """The bytes that torch.save makes of the same dict. Aliases share one storage; there is no place for metadata."""
        write_archive(tensors, read, write)


def read_header(path: Path, *, size: int | None = None, file: int = 0) -> Header:
    """Find and verify the tensors of the file `path`. No data is read but the pickle and the byte order.

    Args:
        size: the true size; all of the file must be here.
        file: the number the entries carry as theirs.

    Raises:
        FileError: not a regular readable file.
        FormatError: PK-*, ZP-*: the first rule that is broken, with the tensor or record as locus.
    """
    with open_regular(path) as (descriptor, status):
        size = status.st_size if size is None else size
        records = read_records(descriptor, size, path)
        layer = layer_of(records, path)
        order = records.get(f"{layer}byteorder")
        if order is not None and read_at(descriptor, min(order.nbytes, 16), order.offset, path) != b"little":
            raise FormatError("ZP-ORDER", "its numbers are not little-endian", path=path, locus=f"{layer}byteorder")
        pickle = records[f"{layer}data.pkl"]
        most = PICKLE_BYTES + PICKLE_BYTES_PER_RECORD * len(records)
        if pickle.nbytes > most:
            reason = f"its pickle has {pickle.nbytes:,} bytes; at most {most:,} are accepted beside {len(records):,} records"
            raise FormatError("PK-LIMIT", reason, path=path)
        data = read_at(descriptor, pickle.nbytes, pickle.offset, path)
        if zlib.crc32(data) != pickle.crc:
            reason = f"its checksum is {zlib.crc32(data):08x}; the archive says {pickle.crc:08x}"
            raise FormatError(
                "ZP-CRC", reason, path=path, locus=f"{layer}data.pkl", hint="a damaged download or copy? fetch it again"
            )
        return Header(
            entries=entries_of(scan(data, path), records, layer, path, file),
            metadata={},
            data_start=0,
            size=size,
            identity=identity(status),
        )
