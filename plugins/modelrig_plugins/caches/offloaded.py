"""Bytes of a cache that lies elsewhere than on the device that runs: on disk for the CPU, in main memory for a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attrs import frozen

from modelrig.components import AttentionSpec, Reason
from modelrig.planning.needs import CacheNeed
from modelrig_plugins.caches.static import StaticPlanner


@frozen
class OffloadedOptions:
    """`directory`: where the file lies whose pages are the cache of a model on the CPU; None for the system's temporary folder."""

    directory: str | None = None


class OffloadedPlanner(StaticPlanner):
    Options = OffloadedOptions

    @staticmethod
    def check(need: CacheNeed, options: OffloadedOptions) -> Iterable[Reason]:  # noqa: ARG004 - protocol
        if options.directory is not None and (not isinstance(options.directory, str) or "\0" in options.directory):
            yield Reason("cache.directory", f"directory {options.directory!r}: the path of a folder is accepted")

    @staticmethod
    def places(
        layers: Sequence[AttentionSpec], batch: int, context: int, dtype: str, options: OffloadedOptions, device: str
    ) -> Mapping[str, int]:
        """Device → bytes, when `device` runs."""
        whole = StaticPlanner.nbytes(layers, batch, context, dtype, options)
        if device == "cpu":
            return {"disk": whole}
        largest = max((StaticPlanner.nbytes((spec,), batch, context, dtype, options) for spec in set(layers)), default=0)
        return {"cpu": whole, device: 2 * largest}
