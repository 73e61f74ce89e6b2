"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from typing import Any

from modelrig.errors import quoted

#: powers as disks and Hugging Face count them, and as memory is counted
SIZE_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([a-zA-Z]{0,3})\s*", re.ASCII)


def size(value: Any) -> int:
    """A number of bytes; text may carry a unit (GB is 10⁹, GiB is 2³⁰). Raises `ValueError` for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 63:
        return value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found and found[2].lower() in SIZE_UNITS:
        whole, _, fraction = found[1].partition(".")
        bytes_ = int(whole + fraction) * SIZE_UNITS[found[2].lower()] // 10 ** len(fraction)
        if bytes_:
            return bytes_
    raise ValueError(f"{quoted(value)}; a number of bytes such as 8000000000, '8GB' or '7.5GiB' is accepted")
