from __future__ import annotations

from collections.abc import Sequence

import pytest

import rigs
from modelrig.errors import ResourceLimitError
from modelrig.planning.environment import Environment, Memory
from modelrig.planning.ledger import Account, Ledger, Weights
from modelrig.planning.memory import human, require_fit
from modelrig.planning.request import Request
from rigs import facts, gpu, machine

MILLION = 10**6


def account(device: str = "cpu", mapped: int = 0, allocated: int = 0) -> Account:
    weights = Weights(mapped=mapped, allocated=allocated, staging=0)
    return Account(device=device, dtype="float32", facts=facts(), weights=weights, cache=rigs.Plain, cache_options=None)


def fit(
    one: Account,
    environment: Environment,
    *,
    context: int = 256,
    batch: int = 1,
    others: Sequence[tuple[str, Account]] = (),
    **limits: int,
) -> tuple[Ledger, list[str]]:
    request = Request(
        max_memory={key.replace("all", ""): value for key, value in limits.items()}, origins={"max_memory": "argument"}
    )
    return require_fit(one, context, batch, request, environment, iter(others))


def test_a_rig_that_fits_has_its_ledger_and_no_notes() -> None:
    ledger, notes = fit(account(allocated=MILLION), machine(100 * MILLION))
    assert (MILLION, []) == (ledger.total("steady", "cpu"), notes)


def test_a_rig_that_needs_more_is_refused_with_both_numbers() -> None:
    with pytest.raises(ResourceLimitError) as caught:
        fit(account(allocated=50 * MILLION), machine(10 * MILLION))
    assert ("RL-MEM", 3) == (caught.value.code, caught.value.exit_code)
    assert "has 10.00 MB (9.54 MiB)" in caught.value.reason
    assert "weights: 50.00 MB" in caught.value.reason
    assert "no smaller context" in str(caught.value.hint)


def test_what_would_fit_is_suggested_exactly() -> None:
    one = account(allocated=5 * MILLION)
    available = one.draw(100, 1).peak("cpu", with_mapped=False)
    with pytest.raises(ResourceLimitError) as caught:
        fit(one, machine(available), context=256, others=[("dtype='bfloat16'", account(allocated=100))])
    assert "these would fit: context=100; dtype='bfloat16'" == caught.value.hint
    with pytest.raises(ResourceLimitError) as caught:
        fit(one, machine(available), context=100, batch=8)
    assert str(caught.value.hint).startswith("these would fit: batch=1; context=")


def test_mapped_weights_may_exceed_free_memory_and_a_note_says_what_that_means() -> None:
    _, notes = fit(account(mapped=50 * MILLION), machine(10 * MILLION))
    assert ["read again" in note for note in notes] == [True]


def test_a_limit_of_the_user_or_of_the_address_space_counts_mapped_weights() -> None:
    with pytest.raises(ResourceLimitError, match="max_memory by argument"):
        fit(account(mapped=50 * MILLION), machine(100 * MILLION), all=10 * MILLION)
    with pytest.raises(ResourceLimitError, match="max_memory"):
        fit(account(mapped=50 * MILLION), machine(100 * MILLION), cpu=10 * MILLION)
    small = Memory(total_bytes=MILLION, available_bytes=10 * MILLION, limited_by="RLIMIT_AS", address_space_bytes=10 * MILLION)
    with pytest.raises(ResourceLimitError, match="RLIMIT_AS"):
        fit(account(mapped=50 * MILLION), machine(memory=small))


def test_a_gpu_is_measured_by_its_own_memory() -> None:
    fits = account("cuda:0", allocated=600 * MILLION)
    fit(fits, machine(10 * MILLION, gpu(free_bytes=2000 * MILLION)))
    with pytest.raises(ResourceLimitError, match="cuda:0 needs"):
        fit(fits, machine(10 * MILLION, gpu(free_bytes=700 * MILLION)))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (4 << 30, "4.29 GB (4.00 GiB)"), (1500, "1.50 kB (1.46 KiB)")]
)
def test_bytes_are_shown_in_both_units(count: int, text: str) -> None:
    assert text == human(count)
