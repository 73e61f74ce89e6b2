"""Checkpoints of every other tool are read bit for bit, and what is saved here is read so by every other tool.

{transformers, accelerate, safetensors, huggingface_hub, torch.save} × {one file, shards} × {safetensors, .bin} × {tied, untied} ×
dtypes, with whole numbers, truth values, a tensor without dimensions and one without elements in every cell. transformers writes
no .bin any more; it reads them.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from binfiles import raw_bytes, reading, stored
from modelrig.checkpoint.saving.protocol import save_checkpoint
from modelrig.components import Snapshot
from modelrig.planning.identify import catalog
from modelrig.registry import current
from modelrig_plugins.formats.pytorch_bin import PytorchBinPlanner
from modelrig_plugins.formats.safetensors import SafetensorsPlanner

FORMATS: dict[str, Any] = {"safetensors": SafetensorsPlanner, "bin": PytorchBinPlanner}
LAYOUTS = {"single": 10**9, "sharded": 150}  # bytes of a shard
FLOATS = ("bfloat16", "float16", "float32", "float64")
MIXED = "mixed"
SHARDED_NAME = {"safetensors": "model{suffix}.safetensors", "bin": "pytorch_model{suffix}.bin"}
WHOLE = ("int64", "int32", "int16", "int8", "uint8")
TIED = ("embed.weight", "head.weight")


class Config(transformers.PreTrainedConfig):
    model_type = "interop"

    def __init__(self, tie_word_embeddings: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.tie_word_embeddings = tie_word_embeddings


class Model(transformers.PreTrainedModel):
    """Parameters and buffers of every sort that a checkpoint has."""

    config_class = Config
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)  # its count is a tensor without dimensions
        self.scale = nn.Parameter(torch.zeros(()))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        for dtype in FLOATS:
            self.register_parameter(f"floats_{dtype}", nn.Parameter(torch.zeros(2, 3)))
        for dtype in WHOLE:
            self.register_buffer(f"numbers_{dtype}", torch.zeros(3, 2, dtype=getattr(torch, dtype)))
        self.register_buffer("mask", torch.zeros(5, dtype=torch.bool))
        self.head = nn.Linear(4, 6, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass


def make(dtype: str, tied: bool, seed: int = 0) -> Model:
    """A model with random bits in everything (NaN and infinity too), of one floating dtype or of all."""
    usual = "float32" if dtype == MIXED else dtype
    model = Model(Config(tie_word_embeddings=tied, dtype=usual)).to(getattr(torch, usual)).eval()
    if dtype == MIXED:
        for one in FLOATS:
            getattr(model, f"floats_{one}").data = torch.zeros(2, 3, dtype=getattr(torch, one))
    generator = torch.Generator().manual_seed(seed)
    for one in {id(one): one for one in (*model.parameters(), *model.buffers())}.values():
        if one.numel():
            bound = 2 if one.dtype == torch.bool else 256
            flat = torch.randint(0, bound, (one.numel() * one.element_size(),), dtype=torch.uint8, generator=generator)
            one.data.copy_(flat.view(one.dtype).view(one.shape))
    model.embed.weight.data.nan_to_num_()  # transformers unties what is not equal to itself
    if tied:
        model.head.weight = model.embed.weight
    assert tied == (model.head.weight is model.embed.weight)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach() for name, one in model.state_dict().items()}


def differing(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in a bit, a shape or a dtype, or are in one of them only."""
    wrong = sorted(expected.keys() ^ found.keys())
    for name in expected.keys() & found.keys():
        one, other = expected[name], found[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape) or not torch.equal(raw_bytes(one), raw_bytes(other)):
            wrong.append(name)
    return wrong


# ------------------------------------------------------------------------------------------------ theirs → ours


def read_ours(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """Every tensor as the reader makes it of the mapped file, and the catalog."""
    chosen, found = catalog(Snapshot(reference=str(folder), root=folder, source="local"), current())
    decode, maps = chosen.registered.implementation().decode, []
    for file in found.files:
        with file.path.open("rb") as opened:
            maps.append(torch.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8))
    entries = found.entries.items()
    return {name: decode(maps[one.file][one.offset : one.offset + one.nbytes], one).clone() for name, one in entries}, found


def by_transformers(model: Model, folder: Path, form: str, size: int) -> None:
    model.save_pretrained(folder, max_shard_size=size)


def by_accelerate(model: Model, folder: Path, form: str, size: int) -> None:
    accelerate.Accelerator(cpu=True).save_model(model, folder, max_shard_size=size, safe_serialization=form == "safetensors")


def by_hub(model: Model, folder: Path, form: str, size: int) -> None:
    folder.mkdir()
    huggingface_hub.save_torch_state_dict(
        state(model), folder, max_shard_size=size, safe_serialization=form == "safetensors",
        shared_tensors_to_discard=["head.weight"] if form == "safetensors" and model.config.tie_word_embeddings else None,
    )  # fmt: skip


def by_the_library(model: Model, folder: Path, form: str, size: int) -> None:
    """The format's own library, file by file, as huggingface_hub splits them."""
    folder.mkdir()
    tensors = state(model)
    if form == "safetensors" and model.config.tie_word_embeddings:
        del tensors["head.weight"]
    save = safetensors.torch.save_file if form == "safetensors" else torch.save
    split = huggingface_hub.split_torch_state_dict_into_shards(tensors, filename_pattern=SHARDED_NAME[form], max_shard_size=size)
    for name, members in split.filename_to_tensors.items():
        save({member: tensors[member] for member in members}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / FORMATS[form].files.index()).write_text(json.dumps(index))


WRITERS: dict[str, tuple[Callable[[Model, Path, str, int], None], tuple[str, ...]]] = {
    "transformers": (by_transformers, ("safetensors",)),
    "accelerate": (by_accelerate, ("safetensors", "bin")),
    "huggingface_hub": (by_hub, ("safetensors", "bin")),
    "the library": (by_the_library, ("safetensors", "bin")),
}


# transformers casts what it loads to one dtype, so it has a cell for each; the others have all dtypes in one model
def cells(tools: dict[str, tuple[Any, tuple[str, ...]]]) -> Iterable[Any]:
    return [
        pytest.param(tool, form, layout, tied, dtype, id=f"{tool}-{form}-{layout}-{'tied' if tied else 'untied'}-{dtype}")
        for tool, (_, forms) in tools.items()
        for form in forms
        for layout in LAYOUTS
        for tied in (False, True)
        for dtype in (FLOATS if tool == "transformers" else (MIXED,))
    ]


@pytest.mark.parametrize(("tool", "form", "layout", "tied", "dtype"), cells(WRITERS))
def test_what_others_save_is_read_bit_for_bit(tmp_path: Path, tool: str, form: str, layout: str, tied: bool, dtype: str) -> None:
    model, folder = make(dtype, tied), tmp_path / "saved"
    WRITERS[tool][0](model, folder, form, LAYOUTS[layout])
    read, found = read_ours(folder)
    expected = state(model)
    if tied and form == "safetensors":
        expected.pop("head.weight" if "embed.weight" in read else "embed.weight")
    assert [] == differing(expected, read)
    assert (layout == "sharded") == (found.index is not None) == (len(found.files) > 1)
    assert () == found.notes
    if tied and form == "bin":
        one, other = (found.entries[name] for name in TIED)
        assert (one.file, one.offset) == (other.file, other.offset)


# ------------------------------------------------------------------------------------------------ ours → theirs


def save_ours(model: Model, folder: Path, form: str, size: int) -> None:
    tensors = state(model)
    files = {"config.json": model.config.to_json_string().encode()}
    save_checkpoint(folder, stored(tensors), reading(tensors), FORMATS[form], max_shard_size=size, files=files, durable=False)


def into_transformers(folder: Path, form: str, model: Model, dtype: str) -> dict[str, Tensor]:
    read, told = Model.from_pretrained(folder, use_safetensors=form == "safetensors", output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if model.config.tie_word_embeddings:
        assert read.head.weight is read.embed.weight
    return state(read)


def into_accelerate(folder: Path, form: str, model: Model, dtype: str) -> dict[str, Tensor]:
    empty = make(dtype, model.config.tie_word_embeddings, seed=1)
    accelerate.load_checkpoint_in_model(empty, folder)
    return state(empty)


def into_hub(folder: Path, form: str, model: Model, dtype: str) -> dict[str, Tensor]:
    empty = make(dtype, model.config.tie_word_embeddings, seed=1)
    huggingface_hub.load_torch_model(empty, folder, strict=False, safe=form == "safetensors", weights_only=True)
    return state(empty)


def into_the_library(folder: Path, form: str, model: Model, dtype: str) -> dict[str, Tensor]:
    def load(path: Path) -> dict[str, Tensor]:
        if form == "safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, weights_only=True, mmap=True)

    found = {name: one for path in folder.glob(f"*.{form}") for name, one in load(path).items()}
    if model.config.tie_word_embeddings and form == "safetensors":
        assert "head.weight" not in found
        found["head.weight"] = found["embed.weight"]
    return found


READERS: dict[str, tuple[Callable[[Path, str, Model, str], dict[str, Tensor]], tuple[str, ...]]] = {
    "transformers": (into_transformers, ("safetensors", "bin")),
    "accelerate": (into_accelerate, ("safetensors", "bin")),
    "huggingface_hub": (into_hub, ("safetensors", "bin")),
    "the library": (into_the_library, ("safetensors", "bin")),
}


@pytest.mark.parametrize(("tool", "form", "layout", "tied", "dtype"), cells(READERS))
def test_what_is_saved_here_is_read_by_others_bit_for_bit(
    tmp_path: Path, tool: str, form: str, layout: str, tied: bool, dtype: str
) -> None:
    model, folder = make(dtype, tied), tmp_path / "saved"
    save_ours(model, folder, form, LAYOUTS[layout])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = READERS[tool][0](folder, form, model, dtype)
    assert [] == differing(state(model), found)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMATS)
def test_files_and_indexes_are_those_of_others(tmp_path: Path, form: str, layout: str, tied: bool) -> None:
    """safetensors byte for byte as transformers; of .bin, in which torch writes a file's own name, the index."""
    model = make("float32", tied)
    (by_transformers if form == "safetensors" else by_hub)(model, tmp_path / "theirs", form, LAYOUTS[layout])
    save_ours(model, tmp_path / "ours", form, LAYOUTS[layout])

    def weights(folder: Path) -> dict[str, bytes]:
        names = FORMATS[form].files
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if names.is_weight_file(path.name)}

    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    if form == "safetensors":
        for name in (name for name in theirs if name.endswith(".json")):
            table = json.loads(theirs[name])
            del table["metadata"]["total_parameters"]  # what is a parameter, and what a buffer, no file says
            theirs[name] = f"{json.dumps(table, indent=2, sort_keys=True)}\n".encode()
        assert theirs == ours
        return
    assert list(theirs) == list(ours)
    for name in (name for name in ours if name.endswith(".json")):
        assert json.loads(theirs[name]) == json.loads(ours[name])
