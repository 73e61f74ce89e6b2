"""How the files of a checkpoint are called: Hugging Face's names, for every format."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from attrs import frozen

_NUMBER = re.compile(r"-\d{5,}-of-(\d{5,})\.[^-]*$")


@frozen
class FileNames:
    """`FileNames("model", ".safetensors")`: the names of a format's files. `variant` is a mark such as "fp16", or None."""

    stem: str
    suffix: str

    def single(self, variant: str | None = None) -> str:
        """`model.safetensors`, `model.fp16.safetensors`"""
        return f"{self.stem}{_mark(variant)}{self.suffix}"

    def shard(self, number: int, count: int, variant: str | None = None) -> str:
        """`model-00001-of-00003.safetensors`, `model.fp16-00001-of-00003.safetensors`; `number` counts from 1."""
        return f"{self.stem}{_mark(variant)}-{number:05d}-of-{count:05d}{self.suffix}"

    def index(self, variant: str | None = None) -> str:
        """`model.safetensors.index.json`, `model.safetensors.index.fp16.json`"""
        return f"{self.stem}{self.suffix}.index{_mark(variant)}.json"

    def is_weight_file(self, name: str) -> bool:
        """Whether `name` is one of these, of any variant and number: what a save of this format may have written."""
        return self._match(name) is not None

    def first(self, names: Collection[str], variant: str | None = None) -> str | None:
        """Where a folder with these files is read from: the single file, else the index, else the only file of this format.

        The single file goes before the index, as in transformers: a save that got by without shards leaves an older index behind.
        A file that is marked as a variant is taken only where that variant is asked for, and one of several numbered ones never: it
        is not the whole model.
        """
        for name in (self.single(variant), self.index(variant)):
            if name in names:
                return name
        others = [name for name in names if name.endswith(self.suffix) and name != self.suffix and self._variant(name) is None]
        return others[0] if variant is None and len(others) == 1 and not is_one_of_several(others[0]) else None

    def variants(self, names: Iterable[str]) -> list[str]:
        """The marks of the variants among these files, sorted."""
        return sorted({mark for mark in map(self._variant, names) if mark is not None})

    def _variant(self, name: str) -> str | None:
        found = self._match(name)
        mark = found and (found["mark"] or found["index_mark"])
        return mark[1:] if mark else None

    def _match(self, name: str) -> re.Match[str] | None:
        mark, stem, suffix = r"\.[^./]+", re.escape(self.stem), re.escape(self.suffix)
        single = rf"{stem}(?P<mark>{mark}?)?(-\d{{5,}}-of-\d{{5,}})?{suffix}"
        return re.fullmatch(rf"{single}|{stem}{suffix}\.index(?P<index_mark>{mark})?\.json", name)


def is_one_of_several(name: str) -> bool:
    """Whether a file is numbered as a part of a whole: `model-00001-of-00003.safetensors`."""
    found = _NUMBER.search(name)
    return found is not None and int(found[1]) > 1


def _mark(variant: str | None) -> str:
    return "" if variant is None else f".{variant}"
