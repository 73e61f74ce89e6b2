"""The options by which every command takes a request: the keys of `modelrig.toml` as flags."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

from modelrig.components import SLOTS
from modelrig.planning.request import read_text

_SLOT_HELP = "auto, a name, a list of names in order of preference (a,b), or !name for anything but"

#: flag → (metavar, help)
FLAGS: dict[str, tuple[str, str]] = {
    **{slot: ("NAME", f"{slot}: {_SLOT_HELP}") for slot in SLOTS},
    "device_map": (
        "DEVICE",
        "auto, balanced, balanced_low_0, sequential, cpu, disk, cuda, cuda:1, or a map as TOML writes it: "
        """'{"" = "cpu", "model.layers.2" = "disk"}'""",
    ),
    "dtype": ("DTYPE", "auto, float32, bfloat16, float16, float64"),
    "context": ("TOKENS", "the longest sequence to plan for; auto is the smaller of the model's and 4096"),
    "batch": ("COUNT", "sequences at once"),
    "variant": ("NAME", "which set of tensor files: fp16 for model.fp16.safetensors"),
    "max_memory": ("SIZE", """bytes the plan may take, such as 8GB or 7.5GiB, or '{"cuda:0" = "20GB", cpu = "60GB"}'"""),
}


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags; the command gets `request`, the keyword arguments for `modelrig.plan`."""

    @functools.wraps(command)
    def with_request(*args: Any, settings: tuple[str, ...], config: str | None, **options: Any) -> Any:
        given = {key: options.pop(key) for key in FLAGS}
        request: dict[str, Any] = {key: read_text(key, text) for key, text in given.items() if text is not None}
        if settings:
            request["set"] = dict(map(_setting, settings))
        if config is not None:
            request["config"] = config
        return command(*args, request=request, **options)

    return _with_flags(with_request, several=False)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the same flags, each of which may be given several times; the command gets `requests`, one for each combination, as
    (what was given several times and is in this one, the keyword arguments for `modelrig.plan`)."""

    @functools.wraps(command)
    def with_requests(*args: Any, settings: tuple[str, ...], config: str | None, **options: Any) -> Any:
        given: dict[str, Sequence[Any]] = {key: [read_text(key, text) for text in options.pop(key)] for key in FLAGS}
        for name, value in map(_setting, settings):
            given.setdefault(name, []).append(value)  # type: ignore[attr-defined]
        return command(*args, requests=list(_combined(given, {} if config is None else {"config": config})), **options)

    return _with_flags(with_requests, several=True)


def _combined(given: Mapping[str, Sequence[Any]], common: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    asked = {key: values for key, values in given.items() if values}
    for values in itertools.product(*asked.values()):
        one = dict(zip(asked, values, strict=True))
        request = {**common, **{key: value for key, value in one.items() if key in FLAGS}}
        if options := {key: value for key, value in one.items() if key not in FLAGS}:
            request["set"] = options
        yield {key: value for key, value in one.items() if len(asked[key]) > 1}, request


def _with_flags(decorated: Callable[..., Any], *, several: bool) -> Callable[..., Any]:
    decorated = click.option("--config", metavar="FILE", help="a TOML file instead of modelrig.toml in the working directory")(
        decorated
    )
    decorated = click.option(
        "--set",
        "settings",
        metavar="SLOT.OPTION=VALUE",
        multiple=True,
        help="an option of a component, such as quantizer.group_size=64",
    )(decorated)
    for key, (metavar, text) in reversed(FLAGS.items()):
        decorated = click.option(f"--{key.replace('_', '-')}", key, metavar=metavar, help=text, multiple=several)(decorated)
    return decorated


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{text!r} is not written as SLOT.OPTION=VALUE", param_hint="--set")
    return key.strip(), read_text("", value)
