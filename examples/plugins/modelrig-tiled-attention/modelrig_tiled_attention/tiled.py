"""Planner of `tiled`: no torch in here."""

from attrs import frozen

from modelrig.components import Reason


@frozen
class Options:
    """What `--set attention.<key>=<value>` may set."""

    block_size: int = 256  # keys looked at together


class TiledPlanner:
    Options = Options

    @staticmethod
    def check(need, options):
        if not 16 <= options.block_size <= 65536:
            yield Reason("attention.block_size", f"block_size is {options.block_size}; accepted is 16 to 65536")
