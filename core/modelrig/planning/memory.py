"""Does the plan fit into memory, and if not, what would?"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from modelrig.errors import ResourceLimitError
from modelrig.planning.environment import Environment
from modelrig.planning.ledger import MAPPED, WEIGHTS, Account, Ledger
from modelrig.planning.request import Request
from modelrig.planning.units import DISK

UNITS = ((10**12, 2**40, "T"), (10**9, 2**30, "G"), (10**6, 2**20, "M"), (10**3, 2**10, "k"))


def human(count: int) -> str:
    """`"4.29 GB (4.00 GiB)"`: as disks count and as memory is counted."""
    for decimal, binary, letter in UNITS:
        if count >= decimal:
            return f"{count / decimal:.2f} {letter}B ({count / binary:.2f} {letter.replace('k', 'K')}iB)"
    return f"{count} B"


@frozen(kw_only=True)
class Limit:
    """How many bytes a device has for the plan, who says so, and whether pages of mapped files count."""

    bytes: int
    why: str
    counts_mapped: bool


def asked_limit(device: str, request: Request) -> int | None:
    """What `max_memory` says of `device`, in bytes."""
    return request.max_memory.get(device, None if device == DISK else request.max_memory.get(""))


def limits(device: str, request: Request, environment: Environment) -> Iterator[Limit]:
    """Every limit that holds for `device`."""
    asked = asked_limit(device, request)
    if asked is not None:
        yield Limit(bytes=asked, why=f"max_memory by {request.origin('max_memory')}", counts_mapped=True)
    available = environment.available_bytes(device)
    if available is not None:
        why = environment.memory.limited_by if device == "cpu" else "free memory"
        yield Limit(bytes=available, why=why, counts_mapped=False)
    if device == "cpu" and environment.memory.address_space_bytes is not None:
        yield Limit(bytes=environment.memory.address_space_bytes, why="RLIMIT_AS", counts_mapped=True)


def broken_limit(
    ledger: Ledger, request: Request, environment: Environment, *, with_pages: bool = False
) -> tuple[str, int, Limit] | None:
    """(device, bytes needed, the limit they exceed), or None if everything fits; `with_pages`, together with mapped files."""
    for device in ledger.devices:
        holds_weights = any(line.device == device and line.what in (MAPPED, WEIGHTS) for line in ledger)
        for limit in limits(device, request, environment):
            if limit.bytes == 0 and limit.counts_mapped and not holds_weights:
                continue  # kept out by max_memory: it may still be passed through
            needed = ledger.peak(device, with_mapped=limit.counts_mapped or with_pages, with_copies=limit.counts_mapped)
            if needed > limit.bytes:
                return device, needed, limit
    return None


def require_fit(
    account: Account,
    context: int,
    batch: int,
    request: Request,
    environment: Environment,
    others: Iterator[tuple[str, Account]],
) -> tuple[Ledger, list[str]]:
    """(the ledger, notes on it). `others` are cheaper rigs to suggest, made only when they are needed.

    Raises:
        ResourceLimitError: RL-MEM with what is needed, what there is, and what would fit.
    """
    ledger = account.draw(context, batch)
    broken = broken_limit(ledger, request, environment)
    if broken is not None:
        device, needed, limit = broken
        lines = "".join(
            f"\n  {line.what}: {human(line.bytes)}" for line in ledger if line.device == device and line.moment == "run"
        )
        ways = list(_alternatives(account, context, batch, request, environment, others))
        raise ResourceLimitError(
            "RL-MEM",
            f"{device} needs {human(needed)} and has {human(limit.bytes)} ({limit.why}){lines}",
            hint=f"these would fit: {'; '.join(ways)}" if ways else "no smaller context, batch or dtype would fit either",
        )
    return ledger, list(_notes(ledger, environment))


def _notes(ledger: Ledger, environment: Environment) -> Iterator[str]:
    available = environment.available_bytes("cpu")
    needed = ledger.peak("cpu", with_mapped=True)
    if available is not None and needed > available:
        yield (
            f"the mapped weights and the rest are {human(needed)}, {human(available)} are available: "
            "pages of the files will be dropped and read again, which is slow"
        )


def _alternatives(
    account: Account,
    context: int,
    batch: int,
    request: Request,
    environment: Environment,
    others: Iterator[tuple[str, Account]],
) -> Iterator[str]:
    def fits(account: Account, context: int, batch: int) -> bool:
        return broken_limit(account.draw(context, batch), request, environment) is None

    if batch > 1 and fits(account, context, 1):
        yield "batch=1"
    if fits(account, 1, batch):
        low, high = 1, context  # fits, does not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(account, middle, batch) else (low, middle)
        yield f"context={low}"
    for name, other in others:
        if fits(other, context, batch):
            yield name
