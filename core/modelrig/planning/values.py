"""How the value of each request key is written, and what it becomes. A value that cannot be used raises ValueError.

The parsers know nothing of files, variables or components: `modelrig.planning.request` says where a value came from, and
negotiation says whether a name means anything.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import Factory, frozen

from modelrig.checkpoint.sizes import size as size
from modelrig.components import FLOATING
from modelrig.errors import nearest, quoted

AUTO = "auto"
NOTHING = "none"  # the name of a kind's doing-nothing component
LIMIT = 1 << 31  # no batch or context is larger

#: further spellings of dtypes: torch's own short names, and those of other tools' configs
DTYPE_SPELLINGS = {
    "float": "float32", "fp32": "float32", "f32": "float32",
    "half": "float16", "fp16": "float16", "f16": "float16",
    "bf16": "bfloat16",
    "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip
_VARIANT = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_DEVICE = re.compile(r"cpu|disk|cuda(?::[0-9]{1,4})?", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,4}", re.ASCII)
#: how a model may be spread over devices
STRATEGIES = (AUTO, "balanced", "balanced_low_0", "sequential")
DEVICES = "'cpu', 'disk', 'cuda', 'cuda:<number>' or a GPU's number"
LISTED, MAX_LISTED = 20, 400  # problems of one value that a message spells out, and characters for them


@frozen
class Wish:
    """What was asked for one slot.

    `names` in order of preference; with `otherwise` any other component may serve when none of them fits. `options` are by
    name, those under "" go to whichever component is chosen.
    """

    names: tuple[str, ...] = ()
    otherwise: bool = True
    excluded: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = Factory(dict)

    @property
    def is_pin(self) -> bool:
        """Exactly one component may serve."""
        return len(self.names) == 1 and not self.otherwise

    def options_of(self, *names: str) -> dict[str, Any]:
        """The options for a component known by any of `names`."""
        merged: dict[str, Any] = {}
        for name in (*names, ""):
            merged |= self.options.get(name, {})
        return merged

    def to_json(self) -> Any:
        """The wish as it would be written in a config file."""
        items: list[Any] = [{"name": name, **self.options[name]} if self.options.get(name) else name for name in self.names]
        items += [f"!{name}" for name in self.excluded]
        if self.otherwise and self.names:
            items.append(AUTO)
        if not items:
            return dict(self.options[""]) if self.options.get("") else AUTO
        return items[0] if len(items) == 1 else items


def slot(value: Any) -> Wish:
    """`"auto"`, a name, `"!name"`, `None` for the doing-nothing choice, `{"name": ..., option: ...}`, or a list of these."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError("an empty list; name at least one component, or leave it at 'auto'")
    names: list[str] = []
    excluded: list[str] = []
    options: dict[str, dict[str, Any]] = {}
    otherwise = False
    for item in items:
        name, given = _named(item)
        if name == AUTO:
            otherwise = True
        elif name.startswith("!"):
            excluded.append(name[1:])
        else:
            names.append(name)
        if given:
            options.setdefault("" if name == AUTO else name, {}).update(given)
    return Wish(tuple(dict.fromkeys(names)), otherwise or not names, tuple(excluded), options)


def _named(item: Any) -> tuple[str, dict[str, Any]]:
    if item is None:
        return NOTHING, {}
    if isinstance(item, Mapping):
        given = dict(item)
        name = given.pop("name", AUTO)
        if not all(isinstance(key, str) for key in given):
            raise ValueError(f"{quoted(item)}; the names of options are strings")
    else:
        name, given = item, {}
    if not isinstance(name, str) or not name.strip("! "):
        raise ValueError(f"{quoted(item)}; 'auto', a component's name, '!name', a list of these or a table with a name is accepted")
    return name, given


def dtype(value: Any) -> str:
    """`"auto"`, a floating dtype by its torch name or a common short one, or a `torch.dtype`."""
    text = str(value) if type(value).__module__ == "torch" else value
    if isinstance(text, str):
        name = text.removeprefix("torch.")
        name = DTYPE_SPELLINGS.get(name, name)
        if name in FLOATING or name == AUTO:
            return name
        raise ValueError(f"{quoted(text)} is not one of auto, {', '.join(FLOATING)}{nearest(name, FLOATING)}")
    raise ValueError(f"{quoted(value)}; one of auto, {', '.join(FLOATING)} is accepted")


def context(value: Any) -> int | str:
    """`"auto"`, or how many tokens a sequence may have."""
    return AUTO if value == AUTO else count(value, "'auto' or a whole number of tokens")


def batch(value: Any) -> int:
    """How many sequences run at once."""
    return count(value, "a whole number of sequences")


def count(value: Any, what: str) -> int:
    """A whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LIMIT:
        raise ValueError(f"{quoted(value)}; {what} from 1 to {LIMIT - 1:,} is accepted")
    return value


def device_map(value: Any) -> str | Mapping[str, str]:
    """`"auto"`, `"balanced"`, `"balanced_low_0"` or `"sequential"`; one device: `"cpu"`, `"disk"`, `"cuda"`, `"cuda:1"`, a GPU's
    number, a `torch.device`; or a map from names of modules and parameters to devices, `""` being the whole model."""
    if isinstance(value, Mapping):
        return _map_of_modules(value)
    text = str(value) if type(value).__module__ == "torch" else value
    return text if isinstance(text, str) and text in STRATEGIES else device(text, STRATEGIES)


def device(value: Any, besides: Sequence[str] = ()) -> str:
    """`"cpu"`, `"disk"`, `"cuda"`, `"cuda:1"`, a GPU's number or a `torch.device`. `besides` is what else a message may offer."""
    text = str(value) if type(value).__module__ == "torch" else value
    if isinstance(text, int) and not isinstance(text, bool) and 0 <= text < 10_000:
        return f"cuda:{text}"
    if isinstance(text, str) and _DEVICE.fullmatch(text):
        return text
    if isinstance(text, str) and _NUMBER.fullmatch(text):
        return f"cuda:{int(text)}"
    guess = nearest(text, ("cpu", "disk", "cuda", *besides)) if isinstance(text, str) else ""
    offered = "".join(f"{name!r}, " for name in besides)
    what = " or a map of modules to devices" if besides else ""
    raise ValueError(f"{quoted(value)}; {offered}{DEVICES}{what} is accepted{guess}")


def numbered(device: str) -> str:
    """The same device, with its number."""
    return "cuda:0" if device == "cuda" else device


def _map_of_modules(value: Mapping[Any, Any]) -> str | Mapping[str, str]:
    if not value:
        raise ValueError("an empty map; every parameter needs a device")
    found, wrong = {}, []
    for name, where in value.items():
        try:
            found[name] = device(where)
        except ValueError:
            wrong.append(f"{quoted(where)} for {quoted(name)}")
        if not isinstance(name, str):
            wrong.append(f"the name {quoted(name)}")
    if wrong:
        text = ", ".join(wrong[:LISTED])
        text = text if len(text) <= MAX_LISTED else text[:MAX_LISTED] + "…"
        more = f" and {len(wrong) - LISTED:,} more" if len(wrong) > LISTED else ""
        raise ValueError(f"{text}{more}; for the name of a module or parameter, {DEVICES} is accepted")
    return found[""] if list(found) == [""] else {name: numbered(where) for name, where in found.items()}


def max_memory(value: Any) -> Mapping[str, int]:
    """Bytes (`8_000_000_000`, `"8GB"`, `"7.5GiB"`) for every GPU and main memory, or a map from device to bytes: of the GPUs it
    names only those are used, 0 keeps a device out, and `"disk"` has no limit unless it is named."""
    if not isinstance(value, Mapping):
        return {"": size(value)}
    limits: dict[str, int] = {}
    for key, limit in value.items():
        where = "" if key == "" else numbered(device(key))
        if where in limits:
            raise ValueError(f"{quoted(where)} is named twice")
        limits[where] = 0 if type(limit) is int and limit == 0 else size(limit)
    return limits


def variant(value: Any) -> str:
    """The mark of a set of tensor files: `"fp16"` for model.fp16.safetensors."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value  # as text, 8 is a number
    if isinstance(text, str) and _VARIANT.fullmatch(text):
        return text
    raise ValueError(f"{quoted(value)}; a short name such as 'fp16', of letters, digits, - and _, is accepted")


def names(value: Any) -> tuple[str, ...]:
    """A name or a list of names."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{quoted(value)}; a list of names is accepted")
    return tuple(items)


def options_of_slots(slots: Sequence[str]) -> Callable[[Any], dict[str, dict[str, Any]]]:
    """A parser of `{"quantizer.group_size": 64}` into `{"quantizer": {"group_size": 64}}`."""

    def parse(value: Any) -> dict[str, dict[str, Any]]:
        """A table from `<slot>.<option>` to the option's value."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{quoted(value)}; a table such as {{'quantizer.group_size': 64}} is accepted")
        options: dict[str, dict[str, Any]] = {}
        for key, item in value.items():
            name, dot, option = key.partition(".") if isinstance(key, str) else ("", "", "")
            if not dot or not option or name not in slots:
                guess = nearest(name, slots) if name and name not in slots else ""
                raise ValueError(f"{quoted(key)}; '<slot>.<option>' with one of {', '.join(slots)} is accepted{guess}")
            options.setdefault(name, {})[option] = item
        return options

    return parse


def from_text(text: str) -> Any:
    """The value of an environment variable or command-line option: TOML where it is (`64`, `true`, `["a", "b"]`,
    `{"" = "cpu"}`), a JSON object, else the text."""
    if "\n" in text or "\r" in text:
        return text
    for read in (_from_toml, json.loads) if text.strip().startswith("{") else (_from_toml,):
        try:
            value = read(text)
        except (ValueError, RecursionError):
            continue
        return value if isinstance(value, str | int | float | bool | list | dict) else text.strip()
    return text.strip()


def _from_toml(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]
