"""Names of files, as Hugging Face's tools write and look for them."""

from __future__ import annotations

import pytest
from huggingface_hub import constants
from transformers.modeling_utils import _add_variant as add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from modelrig.checkpoint.layout import FileNames

SAFETENSORS, BIN = FileNames("model", ".safetensors"), FileNames("pytorch_model", ".bin")


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_single_files_and_indexes_are_called_as_in_transformers(variant: str | None) -> None:
    for files, single, index in (
        (SAFETENSORS, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (BIN, WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        assert [add_variant(single, variant), add_variant(index, variant)] == [files.single(variant), files.index(variant)]


def test_shards_are_called_as_huggingface_hub_does() -> None:
    for files, pattern in (
        (SAFETENSORS, constants.SAFETENSORS_WEIGHTS_FILE_PATTERN),
        (BIN, constants.PYTORCH_WEIGHTS_FILE_PATTERN),
    ):
        assert pattern.format(suffix="-00002-of-00013") == files.shard(2, 13)
        # transformers: the mark goes onto the name of the single file, the number of the shard behind it
        marked = add_variant(files.single(), "fp16").replace(files.suffix, f"{{suffix}}{files.suffix}")
        assert marked.format(suffix="-00002-of-00013") == files.shard(2, 13, "fp16")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.safetensors", None),
        ("model.safetensors.index.json", None),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("model.a.b.safetensors", ...),
        ("other.safetensors", ...),
        ("other.fp16.safetensors", ...),
        ("model.safetensors.bak", ...),
        ("xmodel.safetensors", ...),
    ],
)
def test_weight_files_are_told_from_others_and_variants_by_their_mark(name: str, variant: object) -> None:
    assert (variant is not ...) == SAFETENSORS.is_weight_file(name)
    assert ([variant] if isinstance(variant, str) else []) == SAFETENSORS.variants([name])


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["other.safetensors"], "other.safetensors"),
        (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
        (["model-00001-of-00002.safetensors"], None),
        (["other-00002-of-00003.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["a.safetensors", "b.safetensors"], None),
    ],
)
def test_a_part_is_not_taken_for_the_whole(names: list[str], first: str | None) -> None:
    assert first == SAFETENSORS.first(names)
