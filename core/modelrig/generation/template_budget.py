"""What a chat template may cost: steps, seconds, characters in one value, bytes in all.

A template comes with the checkpoint, so it is as hostile as its author likes. Nothing it asks for is computed before the cost
is known: every operation that could be expensive says beforehand how large its result gets.

Two rules keep that simple. Containers are weighed with multiplicity when they are made (`[a, a]` weighs twice what `a` does), so
whatever Python later does with one in a single uninterruptible call, such as comparing, hashing, sorting or printing, is bounded
by its weight. And all bytes ever made are added up, so what a template can keep alive is bounded too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

SECONDS = 1.0
SECONDS_PER_MESSAGE = 100e-6
STEPS = 200_000
STEPS_PER_MESSAGE = 200
VALUE_WEIGHT = 1 << 20  # and 8 times the weight of the input
ALL_BYTES = 32 << 20  # and 64 times the weight of the input
LARGEST_INTEGER_BITS = 4096
MOST_COMPARISONS = 100_000_000  # characters compared by searches whose worst case is quadratic
BYTES_PER_PIECE = 64  # of a short str in a list
OTHER_WEIGHT = 64  # what is printed in a few characters


class BudgetError(Exception):
    """The template does more work than it may."""


class Budget:
    """Limits of one rendering, which grow with its input.

    Args:
        inputs: the messages, tools and variables. They are plain JSON values, and nested no deeper than the stack allows.
        num_messages: how many messages there are.
    """

    def __init__(self, inputs: Iterable[Any] = (), num_messages: int = 0) -> None:
        self._weights: dict[int, tuple[Any, int]] = {}  # by id; the object is kept, so that its id stays its own
        self._bytes = 0
        self.max_weight = self._max_bytes = sys.maxsize
        weight = sum(map(self.weigh, inputs))
        self.max_weight = VALUE_WEIGHT + 8 * weight
        self._max_bytes = self._bytes + ALL_BYTES + 64 * weight
        self._max_steps = STEPS + STEPS_PER_MESSAGE * num_messages
        self._steps = 0
        self._seconds = SECONDS + SECONDS_PER_MESSAGE * num_messages
        self._deadline = time.monotonic() + self._seconds

    def step(self) -> None:
        """One loop turn, call, comparison or the like."""
        self._steps += 1
        if self._steps > self._max_steps:
            raise BudgetError(f"it takes more than {self._max_steps:,} steps")
        if time.monotonic() > self._deadline:
            raise BudgetError(f"it takes longer than {self._seconds:.1f} seconds")

    def size(self, weight: int) -> None:
        """A value of this weight (for a text, its characters) is about to be made."""
        if weight > self.max_weight:
            raise BudgetError(f"it makes a value of {weight:,} characters or more; {self.max_weight:,} are the limit")

    def charge(self, num_bytes: int) -> None:
        """So many bytes are made."""
        self._bytes += num_bytes
        if self._bytes > self._max_bytes:
            raise BudgetError(f"it makes more than {self._max_bytes:,} bytes of values")

    def integer(self, bits: int) -> None:
        if bits > LARGEST_INTEGER_BITS:
            raise BudgetError(f"it computes with integers of more than {LARGEST_INTEGER_BITS} bits")

    def comparisons(self, count: int) -> None:
        if count > MOST_COMPARISONS:
            raise BudgetError(f"one search compares more than {MOST_COMPARISONS:,} characters")

    def made(self, value: Any) -> Any:
        """Account for a new value and return it."""
        self.step()
        if isinstance(value, str):
            self.size(len(value))
            self.charge(sys.getsizeof(value))
        elif isinstance(value, int):
            self.integer(value.bit_length())
        elif isinstance(value, list | tuple | dict):
            self.weigh(value)
        return value

    def weigh(self, value: Any) -> int:
        """An upper bound of `len(str(value))`, escapes aside. Raises `BudgetError` beyond the limit for one value."""
        if isinstance(value, str):
            return len(value) + 4
        if isinstance(value, int):
            return 8 + value.bit_length() // 3
        if isinstance(value, KeysView | ValuesView | ItemsView):
            return self.weigh(value.mapping)  # type: ignore[union-attr]  # the views of dict have it
        if not isinstance(value, list | tuple | dict):
            return OTHER_WEIGHT
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        weight = 8
        for child in value:
            weight += self.weigh(child)
            if isinstance(value, dict):
                weight += self.weigh(value[child])
            self.size(weight)
        return self.note(value, weight)

    def note(self, value: Any, weight: int) -> int:
        """Remember the weight of a container, which cannot change: the sandbox offers nothing that changes one."""
        self.size(weight)
        self.charge(sys.getsizeof(value))
        self._weights[id(value)] = value, weight
        return weight

    def each(self, values: Any) -> Counted:
        """`values`, each of them a step."""
        return Counted(self, values)

    def items(self, values: Any) -> Any:
        """`values` ready to be taken apart in one call: an iterator becomes a list, which is weighed."""
        if isinstance(values, str):
            self.charge(BYTES_PER_PIECE * len(values))
        elif isinstance(values, list | tuple | dict):
            self.charge(8 * len(values))
        elif isinstance(values, Iterator | range | KeysView | ValuesView | ItemsView):
            taken, weight = [], 8
            for value in self.each(values):
                weight += self.weigh(value)
                self.size(weight)
                taken.append(value)
            self.note(taken, weight)
            return taken
        return values

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The arguments of a call, which may come to lie in one container."""
        self.size(sum(map(self.weigh, args)) + sum(map(self.weigh, kwargs.values())))


class Counted:
    """An iterable whose every item is a step."""

    def __init__(self, budget: Budget, values: Any) -> None:
        self._budget, self._values = budget, values

    def __iter__(self) -> Iterator[Any]:
        step = self._budget.step
        for value in self._values:
            step()
            yield value

    def __len__(self) -> int:
        return len(self._values)
