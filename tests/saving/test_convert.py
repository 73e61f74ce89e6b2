"""Converting: the same values in other files, a few megabytes at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelrig
from checkpoints import write_llama
from modelrig.cli import main
from modelrig.errors import ConfigError, FileError, RequestError, SaveError
from modelrig.loading.transport import TensorFileReader


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.suffix == ".bin":
            found |= torch.load(file, weights_only=True)
    return found


MIXED = {
    "w": torch.randn(5, 3),
    "half": torch.randn(7).half(),
    "brain": torch.randn(2, 2).bfloat16(),
    "double": torch.randn(3, dtype=torch.float64),
    "count": torch.tensor(3),
    "mask": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
    "bytes": torch.arange(6, dtype=torch.uint8),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("size", ["5GB", "40B"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
@pytest.mark.parametrize("to", ["safetensors", "pytorch_bin"])
def test_values_stay_and_floats_are_cast(tmp_path: Path, to: str, dtype: str | None, size: str) -> None:
    (tmp_path / "in").mkdir()
    save_file(MIXED, tmp_path / "in/model.safetensors")
    modelrig.convert(tmp_path / "in", tmp_path / "out", format=to, dtype=dtype, max_shard_size=size)
    found = tensors(tmp_path / "out")
    assert set(MIXED) == set(found)
    for name, tensor in MIXED.items():
        expected = tensor.to(getattr(torch, dtype)) if dtype and tensor.is_floating_point() else tensor
        assert (expected.dtype, expected.shape) == (found[name].dtype, found[name].shape)
        assert torch.equal(expected.reshape(-1).view(torch.uint8), found[name].reshape(-1).view(torch.uint8))


def test_bin_with_ties_and_transposed_tensors_becomes_safetensors_and_back(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    (tmp_path / "in").mkdir()
    torch.save({"embed": weight, "head": weight, "turned": torch.randn(3, 5).t()}, tmp_path / "in/pytorch_model.bin")
    modelrig.convert(tmp_path / "in", tmp_path / "st")
    modelrig.convert(tmp_path / "in", tmp_path / "bin", format="pytorch_bin")
    given = torch.load(tmp_path / "in/pytorch_model.bin", weights_only=True)
    st, bin_ = tensors(tmp_path / "st"), tensors(tmp_path / "bin")
    assert {"embed", "turned"} == set(st)
    assert set(given) == set(bin_)
    assert all(torch.equal(given[name], other[name]) for other in (st, bin_) for name in other)
    assert bin_["embed"].data_ptr() == bin_["head"].data_ptr()


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_llama(source, max_shard_size="20KB")
    (source / "README.md").write_text("about")
    (source / ".hidden").write_text("x")
    (source / "optimizer.pt").write_bytes(b"x")
    modelrig.convert(source, tmp_path / "out", dtype="float16")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "modelrig.json"} == names
    assert "float16" == json.loads((tmp_path / "out/config.json").read_text())["dtype"]
    assert torch.float16 == modelrig.load(tmp_path / "out").module.get_parameter("lm_head.weight").dtype


def test_a_folder_can_be_converted_in_place(tmp_path: Path) -> None:
    write_llama(tmp_path / "model", max_shard_size="20KB")
    before = tensors(tmp_path / "model")
    modelrig.convert(tmp_path / "model", tmp_path / "model", format="pytorch_bin")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "modelrig.json", "pytorch_model.bin"} == names
    after = tensors(tmp_path / "model")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_quantised_weights_are_not_cast(tmp_path: Path) -> None:
    write_llama(tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised"):
        modelrig.convert(tmp_path / "in", tmp_path / "out", dtype="float16")
    assert ["in"] == [path.name for path in tmp_path.iterdir()]
    modelrig.convert(tmp_path / "in", tmp_path / "out", max_shard_size="20KB")  # without a cast it is only moved


@pytest.mark.parametrize("arguments", [{"format": "nothing"}, {"dtype": "int4"}])
def test_what_cannot_be_meant_is_refused(tmp_path: Path, llama_folder: Path, arguments: dict[str, str]) -> None:
    with pytest.raises(RequestError):
        modelrig.convert(llama_folder, tmp_path / "out", **arguments)
    assert [] == list(tmp_path.iterdir())


def test_a_source_that_changes_meanwhile_is_noticed_and_the_target_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "in")
    modelrig.convert(tmp_path / "in", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    read = TensorFileReader.read

    def interfering(self: TensorFileReader, offset: int, buffer: torch.Tensor) -> torch.Tensor:
        with (tmp_path / "in/model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
        return read(self, offset, buffer)

    monkeypatch.setattr(TensorFileReader, "read", interfering)
    with pytest.raises(SaveError) as caught:
        modelrig.convert(tmp_path / "in", tmp_path / "out", dtype="float16")
    assert "no" == caught.value.committed
    assert isinstance(caught.value.__cause__, FileError)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


MEASURED = """
import sys, resource, modelrig
modelrig.convert(sys.argv[1], sys.argv[2], dtype="float32", format="pytorch_bin")  # what is imported and allocated once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
modelrig.convert(sys.argv[3], sys.argv[2], dtype="float32", max_shard_size="50MB")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, llama_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({f"w{number}": torch.randn(4096, 2048).bfloat16() for number in range(16)}, tmp_path / "in/model.safetensors")
    arguments = [sys.executable, "-c", MEASURED, str(llama_folder), str(tmp_path / "out"), str(tmp_path / "in")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64  # MiB, of 256 read and 512 written


def test_the_command_converts_and_says_what_it_wrote(
    tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(llama_folder, tmp_path / "in")
    arguments = [
        "convert",
        str(source),
        str(tmp_path / "out"),
        "--format",
        "pytorch_bin",
        "--dtype",
        "bf16",
        "--max-shard-size",
        "20KB",
    ]
    assert 0 == main([*arguments, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert {file["name"] for file in document["files"]} == {file.name for file in (tmp_path / "out").iterdir()}
    assert 0 == main(["inspect", str(tmp_path / "out"), "--verify"])
    assert "verified" in capsys.readouterr().out
    assert 0 == main(arguments)
    out, err = capsys.readouterr()
    assert "pytorch_model.bin.index.json" in out
    assert "durable" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere", "out"], 1, "SR-UNKNOWN"),
        (["tiny", "out", "--format", "safetensor"], 2, "safetensors"),
        (["tiny", "out", "--max-shard-size", "10XB"], 2, "10XB"),
        (["tiny", "out", "--dtype", "bfloat"], 2, "bfloat16"),
        (["tiny"], 2, "TARGET"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code == main(["convert", *arguments])
    assert said in capsys.readouterr().err
    assert [] == list(tmp_path.iterdir())


def test_a_damaged_file_is_named_by_verify(tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modelrig.convert(llama_folder, tmp_path / "out")
    with (tmp_path / "out/model.safetensors").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    assert 1 == main(["inspect", str(tmp_path / "out"), "--verify"])
    out = capsys.readouterr().out
    assert "IT-HASH" in out
    assert "model.safetensors" in out
    assert 1 == main(["inspect", str(tmp_path / "out"), "--verify", "--json"])
    assert "damaged" == json.loads(capsys.readouterr().out)["integrity"]["state"]
    assert 0 == main(["inspect", str(llama_folder), "--verify", "--json"])
    assert "unverified" == json.loads(capsys.readouterr().out)["integrity"]["state"]
