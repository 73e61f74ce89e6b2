"""Do the stored tensors fill the model? Answered from names and shapes, before a byte of data is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modelrig.components import DTYPE_BITS, Catalog, ModelFacts
from modelrig.errors import LoadError, quoted

#: a float of a whole number of bytes: torch casts between all of them
CASTABLE = frozenset(name for name, bits in DTYPE_BITS.items() if "float" in name and bits >= 8)
LISTED = 20  # names of each sort that the message spells out; the error object holds all


def match(facts: ModelFacts, catalog: Catalog, root: Path) -> None:
    """Raise `LoadError` (LD-TENSORS) listing every missing, unexpected and misshapen tensor, if there is any."""
    entries = catalog.entries
    used = set(facts.ignored)
    missing, misshapen = [], []
    for parameter in facts.parameters:
        for part in parameter.sources:
            name, is_new = part.name, part.name not in used
            used.add(name)
            entry = entries.get(name)
            if entry is not None and entry.shape != part.shape:
                text = f"{name}: stored as {list(entry.shape)}, the config asks for {list(part.shape)}"
                misshapen += [text] if is_new or text not in misshapen else []
            elif entry is None and is_new:
                missing.append(name)
    unexpected = [name for name in entries if name not in used]
    if not (missing or unexpected or misshapen):
        return
    parts = [
        _listed(names, what)
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape"))
        if names
    ]
    raise LoadError(
        "LD-TENSORS",
        f"the stored tensors do not fill the {facts.architecture} model that config.json describes: " + "; ".join(parts),
        path=root,
        locus=(missing or misshapen or unexpected)[0].split(":")[0],
        missing=missing,
        unexpected=unexpected,
        misshapen=misshapen,
        hint="check that config.json and the tensor files belong to the same model",
    )


def require_weights(facts: ModelFacts, catalog: Catalog) -> None:
    """Raise `LoadError` (LD-DTYPE) listing every tensor that is stored as something a weight cannot be cast from."""
    names = dict.fromkeys(part.name for parameter in facts.parameters for part in parameter.sources)
    wrong = [entry for name in names if (entry := catalog.entries.get(name)) is not None and entry.dtype not in CASTABLE]
    if wrong:
        stored = [f"{entry.name}: {entry.dtype}" for entry in wrong]
        raise LoadError(
            "LD-DTYPE",
            f"is stored as {wrong[0].dtype}, which is no plain weight; only a quantizer could read it, and config.json has no "
            f"quantization_config: {_listed(stored, 'such tensors')}",
            path=catalog.files[wrong[0].file].path,
            locus=wrong[0].name,
        )


def _listed(names: Sequence[str], what: str) -> str:
    shown = ", ".join(quoted(name) for name in names[:LISTED])
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what}: {shown}{more}"
