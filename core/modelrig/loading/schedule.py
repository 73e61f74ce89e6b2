"""Which tensor is read when: in the order in which it lies on disk."""

from __future__ import annotations

from attrs import frozen

from modelrig.components import Catalog, ModelFacts, Parameter, TensorEntry


@frozen
class Read:
    """Fill `parameter` from `entry`."""

    parameter: Parameter
    entry: TensorEntry


def schedule(facts: ModelFacts, catalog: Catalog) -> list[Read]:
    """One read for each parameter with storage of its own, sorted by file and offset."""
    reads = [
        Read(parameter, catalog.entries[parameter.stored_as]) for parameter in facts.parameters if parameter.stored_as is not None
    ]
    reads.sort(key=lambda read: (read.entry.file, read.entry.offset))
    return reads
