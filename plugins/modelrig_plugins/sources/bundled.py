"""bundled: models that ship in this package, each a folder of `bundled_models`."""

from __future__ import annotations

from pathlib import Path

from modelrig.components import Snapshot
from modelrig.errors import SourceError, nearest
from modelrig_plugins.sources.local import existing_path

NAME = "bundled"
FOLDER = Path(__file__).with_name("bundled_models")


def bundled_names() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


class BundledPlanner:
    @staticmethod
    def names() -> list[str]:
        """What may be asked for."""
        return bundled_names()

    @staticmethod
    def claims(reference: str) -> str | None:
        """That a model of this name ships, unless a path of that name exists."""
        return f"{reference} ships with Modelrig" if reference in bundled_names() and existing_path(reference) is None else None

    @staticmethod
    def resolve(reference: str) -> Snapshot:
        names = bundled_names()
        if reference not in names:
            raise SourceError(
                "SR-UNKNOWN", f"no bundled model {reference!r}; there is {', '.join(names)}{nearest(reference, names)}"
            )
        return Snapshot(reference=reference, root=FOLDER / reference, source=NAME)
