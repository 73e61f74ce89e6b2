"""What a cache exported, while another one checks whether it can go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modelrig.errors import CacheError


class CacheState:
    """Tensors by name. Whatever is read is checked; `finish` refuses what nobody read, so that nothing is ignored.

    Raises:
        CacheError: CA-STATE, from each method, with the name of the tensor that is not as it must be.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(tensors, Mapping):
            raise CacheError("CA-STATE", f"a cache's state is a mapping of tensors, not {type(tensors).__name__}", locus="state")
        self.tensors = tensors
        self._known: set[str] = set()

    def require(self, is_right: bool, name: str, problem: str, code: str = "CA-STATE") -> None:
        if not is_right:
            raise CacheError(code, f"this cache cannot go on from that state: {problem}", locus=name)

    def tensor(self, name: str, shape: Sequence[int | None], dtype: torch.dtype) -> Tensor:
        """The tensor of that name; None in `shape` stands for any size."""
        self._known.add(name)
        found = self.tensors.get(name)
        if not isinstance(found, Tensor):
            raise CacheError("CA-STATE", "this cache cannot go on from that state: a tensor is missing", locus=name)
        is_shape = len(shape) == found.dim() and all(want in (None, size) for want, size in zip(shape, found.shape, strict=True))
        needed = f"{_text(dtype)} {['any' if size is None else size for size in shape]}"
        self.require(
            is_shape and found.dtype == dtype, name, f"it is {_text(found.dtype)} {list(found.shape)}, and {needed} is needed"
        )
        return found

    def integers(self, name: str, count: int) -> list[int]:
        """An int64 tensor [count] of numbers from 0 on."""
        numbers: list[int] = self.tensor(name, (count,), torch.int64).tolist()
        self.require(all(number >= 0 for number in numbers), name, f"{numbers[:8]} are no counts")
        return numbers

    def finish(self) -> None:
        unknown = sorted(str(name) for name in self.tensors if name not in self._known)
        self.require(not unknown, unknown[0] if unknown else "", "a tensor that it does not know")


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
