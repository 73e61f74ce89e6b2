"""What both formats do when they write: names that a file can hold, and tensors that come in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from modelrig.components import StoredTensor
from modelrig.errors import FormatError, quoted

if TYPE_CHECKING:
    from typing_extensions import Buffer


def require_names(names: Sequence[str], code: str) -> None:
    """Raise `FormatError` with `code` unless every name is there once and can be written as UTF-8."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise FormatError(code, "there are two tensors of this name", locus=twice)
    try:
        "".join(names).encode()
    except UnicodeEncodeError as problem:
        wrong = quoted(problem.object[problem.start : problem.end])
        raise FormatError(code, f"the name of a tensor has half of a surrogate pair, {wrong}, which no file can hold") from problem


def parts_of(tensor: StoredTensor, read: Callable[[StoredTensor], Iterable[Buffer]]) -> Iterator[Buffer]:
    """The parts `read` yields of `tensor`, which are together as long as it: its place in the file is already settled."""
    left = tensor.nbytes
    for part in read(tensor):
        left -= memoryview(part).nbytes
        if left < 0:
            break
        yield part
    if left:
        raise AssertionError(f"{tensor.nbytes - left:,} bytes or more came for {tensor.name!r}, which has {tensor.nbytes:,}")
