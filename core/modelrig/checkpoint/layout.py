"""How the files of a checkpoint are called: Hugging Face's names, for every format."""

from __future__ import annotations

import re

from attrs import frozen


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
        mark, stem, suffix = r"(\.[^./]+)?", re.escape(self.stem), re.escape(self.suffix)
        return re.fullmatch(rf"{stem}{mark}(-\d{{5,}}-of-\d{{5,}})?{suffix}|{stem}{suffix}\.index{mark}\.json", name) is not None


def _mark(variant: str | None) -> str:
    return "" if variant is None else f".{variant}"
