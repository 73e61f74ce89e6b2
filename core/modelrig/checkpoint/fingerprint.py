"""What tells a checkpoint from others of the same shapes: names, sizes, and a few bytes of its tensors."""

from __future__ import annotations

import hashlib
import json
from itertools import groupby

from modelrig.checkpoint.files import identity, open_regular, read_at
from modelrig.components import Catalog
from modelrig.errors import FileError

SAMPLED_TENSORS = 4096  # at most, evenly among all
SAMPLE_BYTES = 256  # from the middle of each


def fingerprint(catalog: Catalog) -> str:
    """A SHA-256 that two trainings of one model do not share, wherever their files are. Reads at most a megabyte.

    Raises:
        FileError: a file is not there any more, or is not the one that was catalogued.
    """
    entries = [catalog.entries[name] for name in sorted(catalog.entries)]
    digest = hashlib.sha256(json.dumps([(one.name, one.dtype, one.shape) for one in entries]).encode())
    samples = {}
    sampled = sorted(entries[:: -(-len(entries) // SAMPLED_TENSORS) or 1], key=lambda one: (one.file, one.offset))
    for number, of_file in groupby(sampled, key=lambda one: one.file):
        file = catalog.files[number]
        with open_regular(file.path) as (descriptor, status):
            if file.identity not in (None, identity(status)):
                raise FileError("IO-CHANGED", "it is not the file that was loaded", path=file.path)
            for one in of_file:
                count = min(one.nbytes, SAMPLE_BYTES)
                samples[one.name] = read_at(descriptor, count, one.offset + (one.nbytes - count) // 2, file.path)
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()
