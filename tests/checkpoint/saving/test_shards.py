"""Which tensor goes into which file, compared with huggingface_hub's own split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from modelrig.checkpoint.layout import FileNames
from modelrig.checkpoint.saving.shards import lay_out, shard_bytes
from modelrig.components import StoredTensor
from modelrig.errors import SaveError

NAMES = FileNames("model", ".safetensors")


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30),
    st.one_of(st.integers(1, 400), st.sampled_from(["0.1KB", "100KB"])),
    st.sampled_from([None, "fp16"]),
)
def test_files_index_and_order_are_those_of_hugging_face(sizes: list[int], limit: int | str, variant: str | None) -> None:
    weights = {f"w.{number}": torch.empty(size, dtype=torch.float32) for number, size in enumerate(sizes)}
    pattern = "model{suffix}.safetensors" if variant is None else f"model.{variant}{{suffix}}.safetensors"
    # Empty tensors share the storage that has no address; there they are ties, here they are tensors like others.
    expected = split_torch_state_dict_into_shards(
        {name: one for name, one in weights.items() if one.numel()}, filename_pattern=pattern, max_shard_size=limit
    )
    tensors = [StoredTensor(name, "float32", tuple(one.shape)) for name, one in weights.items() if one.numel()]
    if not tensors:
        return
    layout = lay_out(tensors, limit, NAMES, variant=variant)
    assert expected.filename_to_tensors == {shard.name: [one.name for one in shard.tensors] for shard in layout.shards}
    if expected.is_sharded:
        assert layout.index is not None
        table = {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}
        assert (json.dumps(table, indent=2, sort_keys=True) + "\n").encode() == layout.index[1]
    else:
        assert layout.index is None


def test_the_index_is_the_file_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(tmp_path, max_shard_size=4000)
    written = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del written["metadata"]["total_parameters"]  # a count of parameters, which files do not know
    tensors = [StoredTensor(name, "float32", tuple(one.shape)) for name, one in model.state_dict().items()]
    layout = lay_out(tensors, 4000, NAMES)
    assert layout.index == ("model.safetensors.index.json", (json.dumps(written, indent=2, sort_keys=True) + "\n").encode())


def test_ties_are_counted_once_and_named_where_the_format_writes_them() -> None:
    tensors = [StoredTensor("a", "float32", (10,), aliases=("b",)), StoredTensor("c", "float32", (10,))]
    for with_aliases, expected in ((False, {"a", "c"}), (True, {"a", "b", "c"})):
        layout = lay_out(tensors, 40, NAMES, with_aliases=with_aliases)
        assert layout.index is not None
        table = json.loads(layout.index[1])
        assert (expected, 80) == (set(table["weight_map"]), table["metadata"]["total_size"])


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own() -> None:
    tensors = [StoredTensor("small", "uint8", (1,)), StoredTensor("large", "uint8", (100,)), StoredTensor("last", "uint8", (1,))]
    layout = lay_out(tensors, 10, NAMES)
    assert [["large"], ["small", "last"]] == [[one.name for one in shard.tensors] for shard in layout.shards]


def test_marked_names_are_like_no_others() -> None:
    tensors = [StoredTensor("a", "uint8", (9,)), StoredTensor("b", "uint8", (9,))]
    layout = lay_out(tensors, 10, NAMES, mark="0123456789ab", variant="fp16")
    assert "model.fp16-0123456789ab-00001-of-00002.safetensors" == layout.shards[0].name
    assert lay_out(tensors, 20, NAMES, mark="0123456789ab").shards[0].name == "model.safetensors"


def test_no_tensors_are_one_empty_file() -> None:
    assert [("model.safetensors", ())] == [(one.name, one.tensors) for one in lay_out([], "5GB", NAMES).shards]


@pytest.mark.parametrize(("written", "size"), [("5GB", 5 * 10**9), ("5GiB", 5 << 30), (7, 7), ("200MB", 200 * 10**6)])
def test_sizes_are_decimal_unless_they_say_otherwise(written: int | str, size: int) -> None:
    assert size == shard_bytes(written)


@pytest.mark.parametrize("written", [0, -1, "10XB", "", "GB", True, None, 1.5])
def test_what_is_no_size_is_refused(written: object) -> None:
    with pytest.raises(SaveError, match="SV-ARGS") as caught:
        shard_bytes(written)  # type: ignore[arg-type]
    assert "max_shard_size" == caught.value.locus
