"""What the user asked for, each value with its origin.

Call arguments win over `MODELRIG_<KEY>` environment variables, these over the config file, and that over the defaults. The
config file is `modelrig.toml` in the working directory, or what `config=` names. One that lies in the checkpoint's own folder is
never read by itself: a checkpoint decides nothing about how it is run.

    attention = ["flash_attention_2", "sdpa"]     # an ordered wish; a single name is a pin
    cache = "!static"                             # anything but this
    dtype = "bfloat16"                            # float32 bfloat16 float16 float64, or fp32 bf16 fp16 half ...
    context = 2048
    max_memory = "6GiB"

    [quantizer]
    name = "int4"
    group_size = 64

For the five slots `None` means the component called `none`; for the other keys it means "not given".
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import Factory, evolve, frozen

from modelrig.checkpoint.files import open_regular, read_at
from modelrig.components import SLOTS
from modelrig.errors import FileError, RequestError, nearest, quoted
from modelrig.planning import values
from modelrig.planning.values import AUTO, NOTHING, Wish

CONFIG_FILE = "modelrig.toml"
MAX_CONFIG_BYTES = 1 << 20
LISTED = 20  # problems that a message spells out
PREFIX = "MODELRIG_"
#: variables of ours that are no request keys, so that a misspelt key is told from them
OTHER_VARIABLES = {
    "PLUGINS": "plugins from outside that may be imported, by name; set and empty, only our own",
    "DEBUG": "1: the command line shows the traceback of an error",
}

ARGUMENT, DEFAULT = "argument", "default"
ANYTHING, NO_PART = Wish(), Wish((NOTHING,), otherwise=False)

#: request key → how its value is read
PARSERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(SLOTS, values.slot),
    "device_map": values.device_map,
    "dtype": values.dtype,
    "context": values.context,
    "batch": values.batch,
    "max_memory": values.max_memory,
    "variant": values.variant,
    "prefer": values.names,
    "disable": values.names,
    "set": values.options_of_slots(tuple(SLOTS)),
}
COMMA_SEPARATED = (*SLOTS, "prefer", "disable")  # as text, "a,b" is a list


@frozen(kw_only=True)
class Request:
    """Every request key with its value. `origins` has "argument", a variable's name, a file's path or "default" for each key."""

    quantizer: Wish = ANYTHING
    attention: Wish = ANYTHING
    cache: Wish = ANYTHING
    decoder: Wish = ANYTHING
    compiler: Wish = NO_PART
    device_map: str | Mapping[str, str] = AUTO
    dtype: str = AUTO
    context: int | str = AUTO
    batch: int = 1
    max_memory: Mapping[str, int] = Factory(dict)
    variant: str | None = None
    prefer: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    origins: Mapping[str, str] = Factory(dict)
    notes: tuple[str, ...] = ()

    def wish(self, slot: str) -> Wish:
        """What was asked for `slot`, a key of `modelrig.components.SLOTS`."""
        wish: Wish = getattr(self, slot)
        return wish

    def origin(self, key: str) -> str:
        return self.origins.get(key, DEFAULT)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """`{key: {"value": ..., "origin": ...}}`, values as a config file would have them."""
        return {key: {"value": _plain(getattr(self, key)), "origin": self.origin(key)} for key in PARSERS if key != "set"}


def _plain(value: Any) -> Any:
    if isinstance(value, Wish):
        return value.to_json()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return value[""] if list(value) == [""] else dict(value) or None
    return value


@frozen
class _Problem:
    code: str
    key: str
    text: str
    path: str | None = None


@frozen
class _Layer:
    """One place values come from; `name_of` says what a key is called there."""

    pairs: Mapping[str, Any]
    name_of: Callable[[str], str]
    origin: Callable[[str], str]
    path: str | None = None


def read_request(
    arguments: Mapping[str, Any],
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
    checkpoint: Path | None = None,
) -> Request:
    """Arguments over variables over config file over defaults.

    Args:
        arguments: request keys given by the caller.
        config: a TOML file or a mapping, instead of `modelrig.toml` in `directory` (the working directory).
        checkpoint: the checkpoint's folder, where no config file is looked for.

    Raises:
        RequestError: RQ-FILE, or one error that lists every unknown key (RQ-UNKNOWN) and unusable value (RQ-VALUE).
    """
    environ = os.environ if environ is None else environ
    file, notes = _config_layer(config, directory or Path.cwd(), checkpoint)
    problems: list[_Problem] = []
    found: dict[str, Any] = {}
    origins: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {}
    for layer in (file, _variables(environ), _Layer(arguments, str, lambda _: ARGUMENT)):
        for key, value in layer.pairs.items():
            if key not in PARSERS:
                known = [layer.name_of(name) for name in PARSERS]
                seen = layer.name_of(str(key))
                text = f"unknown; known are {', '.join(known)}{nearest(seen, known)}"
                problems.append(_Problem("RQ-UNKNOWN", seen, text, layer.path))
            elif value is not None or key in SLOTS:
                try:
                    parsed = PARSERS[key](value)
                except ValueError as error:
                    problems.append(_Problem("RQ-VALUE", layer.name_of(key), str(error), layer.path))
                    continue
                if key == "set":
                    for slot, given in parsed.items():
                        options.setdefault(slot, {}).update(given)
                        origins |= {f"{slot}.{option}": layer.origin(key) for option in given}
                else:
                    found[key], origins[key] = parsed, layer.origin(key)
    _raise(problems)
    request = Request(**found, origins=origins, notes=notes)
    for slot, given in options.items():
        wish = request.wish(slot)
        target = wish.names[0] if wish.is_pin else ""
        merged = {**wish.options, target: {**wish.options.get(target, {}), **given}}
        changed: dict[str, Any] = {slot: evolve(wish, options=merged)}
        request = evolve(request, **changed)
    return request


def _raise(problems: list[_Problem]) -> None:
    if not problems:
        return
    first = problems[0]
    if len(problems) == 1:
        raise RequestError(first.code, first.text, path=first.path, locus=first.key)
    lines = "".join(f"\n  - {_where(problem)}: {problem.text} [{problem.code}]" for problem in problems[:LISTED])
    if len(problems) > LISTED:
        lines += f"\n  and {len(problems) - LISTED:,} more"
    raise RequestError(first.code, f"{len(problems)} problems:{lines}", path=first.path, locus=first.key)


def _where(problem: _Problem) -> str:
    return ": ".join(quoted(part)[1:-1] for part in (problem.path, problem.key) if part)


# ------------------------------------------------------------------------------------------------ environment variables


def _variables(environ: Mapping[str, str]) -> _Layer:
    return _Layer(dict(_given_variables(environ)), lambda key: PREFIX + key.upper(), lambda key: PREFIX + key.upper())


def _given_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in OTHER_VARIABLES and text != "":
            yield name.lower(), read_text(name.lower(), text)


def read_text(key: str, text: str) -> Any:
    """The value of request key `key` written as text, as environment variables and command-line options do."""
    value = values.from_text(text)
    if key in COMMA_SEPARATED and isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


# ------------------------------------------------------------------------------------------------ config file


def _config_layer(config: Any, directory: Path, checkpoint: Path | None) -> tuple[_Layer, tuple[str, ...]]:
    if isinstance(config, Mapping):
        return _Layer(config, str, lambda _: "config"), ()
    if config is not None and not isinstance(config, str | os.PathLike):
        raise RequestError("RQ-VALUE", f"{quoted(config)}; a path or a mapping is accepted", locus="config")
    path = directory / CONFIG_FILE if config is None else Path(os.fspath(config))
    notes = []
    if config is None and not os.path.lexists(path):
        return _Layer({}, str, str), ()
    if config is None and checkpoint is not None and _is_inside(path, checkpoint):
        notes.append(f"{path} was not read: it lies in the checkpoint's own folder")
        return _Layer({}, str, str), tuple(notes)
    return _Layer(_read_toml(path), str, lambda _: str(path), str(path)), ()


def _is_inside(path: Path, folder: Path) -> bool:
    real = Path(os.path.realpath(folder))  # Path.resolve raises for a link to itself
    places = (Path(os.path.realpath(path)).parent, Path(os.path.realpath(path.parent)))
    return any(place == real or real in place.parents for place in places)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as (descriptor, _):
            data = read_at(descriptor, MAX_CONFIG_BYTES + 1, 0, path)
        if len(data) > MAX_CONFIG_BYTES:
            raise RequestError("RQ-FILE", f"larger than {MAX_CONFIG_BYTES:,} bytes", path=path)
        return tomllib.loads(data.decode("utf-8"))
    except FileError as error:
        raise RequestError("RQ-FILE", error.reason, path=path) from error
    except RecursionError as error:
        raise RequestError("RQ-FILE", "nested too deeply", path=path) from error
    except ValueError as error:  # of UTF-8 and of TOML
        raise RequestError("RQ-FILE", f"not TOML: {error}", path=path) from error
