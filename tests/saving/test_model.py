"""What `Model.save` writes loads again, here and in transformers, with the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import modelrig
from checkpoints import write_llama
from modelrig.errors import LoadError, RequestError, SaveError
from residue import held

IDS = torch.tensor([[5, 9, 2, 44, 7, 61, 3]])


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> modelrig.Model:
    folder = tmp_path_factory.mktemp("source")
    write_llama(folder, tie_word_embeddings=request.param)
    return modelrig.load(folder)


@pytest.mark.parametrize("size", ["5GB", "20KB", 1])
@pytest.mark.parametrize("to", ["safetensors", "pytorch_bin"])
def test_a_saved_model_is_the_same_here_and_in_transformers(
    model: modelrig.Model, tmp_path: Path, to: str, size: int | str
) -> None:
    report = model.save(tmp_path / "out", format=to, max_shard_size=size)
    assert torch.equal(model(IDS), modelrig.load(tmp_path / "out")(IDS))
    torch.testing.assert_close(model(IDS), logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)
    assert sorted(file.name for file in report.files) == sorted(contents(tmp_path / "out"))
    assert report.bytes == sum(map(len, contents(tmp_path / "out").values()))


def test_shards_and_index_are_those_of_the_hubs_library(model: modelrig.Model, tmp_path: Path) -> None:
    model.save(tmp_path, max_shard_size=20_000)
    state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}  # views share their file's storage
    if model.plan.facts.ties:
        del state["lm_head.weight"]
    expected = split_torch_state_dict_into_shards(state, filename_pattern="model{suffix}.safetensors", max_shard_size=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert expected.tensor_to_filename == index["weight_map"]
    assert expected.metadata["total_size"] == index["metadata"]["total_size"]
    for name in expected.filename_to_tensors:
        with safe_open(tmp_path / name, "pt") as file:
            assert {"format": "pt"} == file.metadata()


def test_the_head_that_is_tied_is_stored_once_or_as_one_storage(model: modelrig.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "st")
    model.save(tmp_path / "bin", format="pytorch_bin")
    with safe_open(tmp_path / "st/model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not model.plan.facts.ties)  # noqa: SIM118 - no mapping
    state = torch.load(tmp_path / "bin/pytorch_model.bin", weights_only=True)
    same = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert bool(model.plan.facts.ties) == same


@pytest.mark.parametrize("to", ["bfloat16", "float16", "float64"])
def test_dtype_is_what_is_written_and_what_the_config_says(model: modelrig.Model, tmp_path: Path, to: str) -> None:
    model.save(tmp_path, dtype=to)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, tensor in model.module.named_parameters():
            assert torch.equal(tensor.to(getattr(torch, to)), file.get_tensor(name))
    assert to == json.loads((tmp_path / "config.json").read_text())["dtype"]
    assert to == modelrig.plan(tmp_path).dtype


def test_weights_that_were_changed_are_what_is_saved(llama_folder: Path, tmp_path: Path) -> None:
    model = modelrig.load(llama_folder)
    weight = model.module.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight.mul_(2)
    model.save(tmp_path)
    assert torch.equal(weight, modelrig.load(tmp_path).module.get_parameter("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_stay_on_disk_are_saved_too(llama_folder: Path, tmp_path: Path, dtype: str) -> None:
    whole = modelrig.load(llama_folder, dtype=dtype)
    model = modelrig.load(llama_folder, dtype=dtype, device_map={"": "cpu", "model.layers.1": "disk", "lm_head": "disk"})
    whole.save(tmp_path / "whole")
    model(IDS)
    model.save(tmp_path / "streamed")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "streamed/model.safetensors").read_bytes()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": "cpu", "model.layers.1": "disk"}], ids=["memory", "disk"])
def test_saving_over_its_own_files_changes_neither_the_model_nor_the_weights(
    llama_folder: Path, tmp_path: Path, device_map: dict[str, str]
) -> None:
    folder = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    (folder / "notes.txt").write_text("mine")
    model = modelrig.load(folder, device_map=device_map)
    before, weights = model(IDS), (folder / "model.safetensors").read_bytes()
    for _ in range(2):  # the second one reads from files that are no longer in the folder
        model.save(folder)
        assert torch.equal(before, model(IDS))
        assert weights == (folder / "model.safetensors").read_bytes()
    assert torch.equal(before, modelrig.load(folder)(IDS))
    assert "mine" == (folder / "notes.txt").read_text()


def test_tokenizer_and_templates_go_with_the_model(tmp_path: Path) -> None:
    model = modelrig.load("tiny")
    model.save(tmp_path)
    saved = modelrig.load(tmp_path)
    text, chat = "def add(a, b):", [{"role": "user", "content": "hello"}]
    assert model.generate(text, max_new_tokens=8).text == saved.generate(text, max_new_tokens=8).text
    assert model.chat_prompt(chat) == saved.chat_prompt(chat)


def test_a_stored_head_that_the_config_would_tie_stays_untied_elsewhere(
    tmp_path: Path, edited_checkpoint: Callable[..., Path]
) -> None:
    model = modelrig.load(edited_checkpoint(tie_word_embeddings=True))
    model.save(tmp_path / "out")
    torch.testing.assert_close(model(IDS), logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)


def test_a_variant_has_its_mark_in_every_name(model: modelrig.Model, tmp_path: Path) -> None:
    model.save(tmp_path, variant="fp16", dtype="float16", max_shard_size="20KB")
    names = [name for name in contents(tmp_path) if "safetensors" in name]
    assert all(name.startswith("model.fp16-0") or name == "model.safetensors.index.fp16.json" for name in names)
    assert torch.equal(model.module.get_parameter("lm_head.weight").half(), loaded(tmp_path, variant="fp16")["lm_head.weight"])


def loaded(folder: Path, **request: Any) -> dict[str, torch.Tensor]:
    return dict(modelrig.load(folder, **request).module.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ({"format": "safetensor"}, "RQ-NAME", "safetensors"),
        ({"format": 3}, "RQ-VALUE", "name of a format"),
        ({"max_shard_size": "10XB"}, "SV-ARGS", "10XB"),
        ({"max_shard_size": 0}, "SV-ARGS", "0"),
        ({"dtype": "int8"}, "RQ-VALUE", "int8"),
        ({"variant": "../x"}, "SV-ARGS", "../x"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    model: modelrig.Model, tmp_path: Path, arguments: dict[str, Any], code: str, part: str
) -> None:
    with pytest.raises((RequestError, SaveError)) as caught:
        model.save(tmp_path / "out", **arguments)
    assert (code, True) == (caught.value.code, part in str(caught.value))
    assert [] == list(tmp_path.iterdir())


def test_a_closed_model_cannot_be_saved(llama_folder: Path, tmp_path: Path) -> None:
    model = modelrig.load(llama_folder)
    model.close()
    with pytest.raises(LoadError, match="LD-CLOSED"):
        model.save(tmp_path / "out")


def test_a_weight_without_values_is_named(llama_folder: Path, tmp_path: Path) -> None:
    model = modelrig.load(llama_folder)
    model.module.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(SaveError, match=r"model\.layers\.0\.mlp\.up_proj\.weight") as caught:
        model.save(tmp_path / "out")
    assert ("SV-TENSOR", "no") == (caught.value.code, caught.value.committed)
    assert [] == list(tmp_path.iterdir())


def test_saving_leaves_nothing_open(llama_folder: Path, tmp_path: Path) -> None:
    model = modelrig.load(llama_folder, device_map={"": "cpu", "model.layers.1": "disk"}, dtype="bfloat16")
    model.save(tmp_path / "first")
    before = held(llama_folder)
    for number in range(3):
        model.save(tmp_path / str(number), max_shard_size="20KB")
    assert before == held(llama_folder)


def test_progress_is_in_bytes_of_tensors(model: modelrig.Model, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    model.save(tmp_path, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in model.module.parameters())
    assert (total, total) == calls[-1]
    assert calls == sorted(calls)


def test_a_progress_function_that_raises_leaves_the_folder_as_it_was(model: modelrig.Model, tmp_path: Path) -> None:
    model.save(tmp_path / "out")
    before = contents(tmp_path / "out")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "out", dtype="float16", progress=interrupt)
    assert before == contents(tmp_path / "out")
    assert ["out"] == [path.name for path in tmp_path.iterdir()]


def test_the_plan_of_a_layout_put_together_of_parts_is_saved_in_that_layout(llama_folder: Path, tmp_path: Path) -> None:
    """q, k and v as one parameter in memory, three tensors on disk: saving reads the parts backwards."""
    from modelrig.checkpoint.mapping import Concat, apply_rules
    from modelrig.components import Parameter
    from modelrig.saving.model import save_model

    plan = modelrig.plan(llama_folder)
    shapes = {name: entry.shape for name, entry in plan.catalog.entries.items()}
    names = [f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = apply_rules([Concat(names, "model.layers.{i}.self_attn.qkv.weight")], shapes)
    parameters = tuple(Parameter(name, target.shape, "linear", None, parts=target.parts) for name, target in fused.items())
    module = torch.nn.Module()
    stored = dict(modelrig.load(llama_folder).module.named_parameters())
    for one in parameters:
        value = torch.cat([stored[part.name] for part in one.parts]).detach()
        owner = module
        *path, leaf = one.name.split(".")
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, torch.nn.Module())
            owner = getattr(owner, step)
        owner.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
    plan = attrs.evolve(plan, facts=attrs.evolve(plan.facts, parameters=parameters, ties={}))
    save_model(module, plan, plan.choices["formats"].registered.implementation(), tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert set(stored) == set(file.keys())
        assert all(torch.equal(tensor, file.get_tensor(name)) for name, tensor in stored.items())
