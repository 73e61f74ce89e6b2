"""The source `hub`: against a hub of our own on this machine, and against a cache folder without any hub.

huggingface_hub reads its variables when it is imported, so each case runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub, serving
from tensorfiles import describe, encode, write_sharded, write_valid

#: plan (and fetch, if asked to), and tell what came of it
CLIENT = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None
from attrs import asdict, evolve
from modelrig.errors import ModelrigError
from modelrig_plugins.formats.safetensors import SafetensorsPlanner
from modelrig_plugins.sources.hub import HubPlanner
from modelrig_plugins.sources.hub_module import HubFetcher

def told(snapshot):
    catalog = SafetensorsPlanner.catalog(snapshot)
    return {
        "root": str(snapshot.root), "revision": snapshot.revision, "complete": snapshot.complete,
        "files": sorted(path.name for path in snapshot.root.iterdir()),
        "entries": [asdict(entry) for entry in catalog.entries.values()],
        "identified": [file.identity is not None for file in catalog.files],
        "beside": [str(folder) for _, folder in snapshot.headers.values()],
    }

(reference, _, variant), meanwhile = sys.argv[1].partition("#"), sys.argv[3:]
answer = {}
try:
    planned = HubPlanner.resolve_variant(reference, variant) if variant else HubPlanner.resolve(reference)
    planned = evolve(planned, variant=variant or None)
    answer["planned"] = told(planned)
    if sys.argv[2] == "fetch":
        if meanwhile:
            Path(meanwhile[1]).write_bytes(Path(meanwhile[0]).read_bytes())
        progress = []
        fetched = HubFetcher.fetch(planned, lambda done, total: progress.append([done, total]))
        answer.update(fetched=told(fetched), progress=progress)
except ModelrigError as error:
    answer["error"] = {**error.to_json(), "text": str(error)}
print(json.dumps(answer))
"""
NAME = "org/model"


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture
def client(tmp_path):
    """`client(reference, action, **variables)`: what a fresh process with this cache says. "org/model#fp16" asks for a variant."""

    def ask(reference: str, action: str = "plan", *meanwhile: Path, hub: Hub | None = None, **variables: str) -> dict[str, Any]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
        temporary = tmp_path / "temporary"
        temporary.mkdir(exist_ok=True)
        surroundings = {**kept, "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(temporary), **variables}
        surroundings.update({"HF_ENDPOINT": hub.url} if hub else {"HF_HUB_OFFLINE": "1"})
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", CLIENT, reference, action, *map(str, meanwhile)],
            capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env=surroundings, check=False,
        )  # fmt: skip
        assert 0 == done.returncode, done.stderr
        assert "Traceback" not in done.stderr
        assert [] == list(temporary.iterdir()), "left behind"
        return {**json.loads(done.stdout), "stderr": done.stderr}

    return ask


@pytest.fixture
def repository(tmp_path):
    """A folder to publish: two shards of 24 and 8 MB with everything beside them that a model has, and that it does not need."""
    folder = tmp_path / "published"
    folder.mkdir()
    one, two = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    write_sharded(folder, {one: ["a", "b"], two: ["c"]})
    write_valid(folder / one, a=("F32", [2, 3]), b=("BF16", [1500, 8000]))
    write_valid(folder / two, c=("U8", [8_000_000]))
    for name, text in {
        "config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "README.md": "#", "modeling_evil.py": "1",
        "pytorch_model.bin": "x" * 99, "additional_chat_templates/tool.jinja": "t", "onnx/config.json": "{}",
        "1_Pooling/config.json": "{}",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


SMALL = [
    "1_Pooling",
    "additional_chat_templates",
    "chat_template.jinja",
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_planning_downloads_small_files_and_headers_only(hub, client, repository):
    commit = hub.add(NAME, repository, "main")
    planned = client(NAME, hub=hub)["planned"]
    assert (commit, False, SMALL) == (planned["revision"], planned["complete"], planned["files"])
    assert ["a", "b", "c"] == [entry["name"] for entry in planned["entries"]]
    assert [False, False] == planned["identified"]
    assert hub.sent(".safetensors") <= 2 * (1 << 17)
    assert 0 == hub.sent(".bin") + hub.sent(".md") + hub.sent(".py") + hub.sent("onnx/config.json")


def test_fetching_completes_the_planned_snapshot_with_progress_in_bytes(hub, client, repository):
    commit = hub.add(NAME, repository, "main")
    told = client(NAME, "fetch", hub=hub)
    planned, fetched = told["planned"], told["fetched"]
    assert planned["entries"] == fetched["entries"]
    assert (True, commit, sorted([*SMALL, *SHARDS])) == (fetched["complete"], fetched["revision"], fetched["files"])
    assert [True, True] == fetched["identified"]
    size = sum((repository / shard).stat().st_size for shard in SHARDS)
    assert [size, size] == told["progress"][-1]
    assert sorted(told["progress"]) == told["progress"]
    for shard in SHARDS:
        assert (repository / shard).read_bytes() == (Path(fetched["root"]) / shard).read_bytes()
    assert 0 == hub.sent(".bin")
    assert "" == told["stderr"]


def test_what_was_fetched_is_used_offline_by_branch_and_by_commit(hub, client, repository):
    commit = hub.add(NAME, repository, "main", "v1")
    fetched = client(NAME, "fetch", hub=hub)["fetched"]
    for reference in (NAME, f"{NAME}@main", f"{NAME}@{commit}"):
        offline = client(reference, "fetch")
        assert (fetched["entries"], True, commit) == (
            offline["planned"]["entries"], offline["planned"]["complete"], offline["planned"]["revision"],
        )  # fmt: skip
    assert "SR-FETCH" == client(f"{NAME}@v1")["error"]["code"]


def test_a_commit_that_is_complete_in_the_cache_asks_nobody(hub, client, repository):
    commit = hub.add(NAME, repository, "main")
    client(NAME, "fetch", hub=hub)
    hub.seen.clear()
    assert client(f"{NAME}@{commit}", "fetch", hub=hub)["planned"]["complete"]
    assert [] == hub.seen


def test_a_branch_that_moved_is_planned_anew(hub, client, repository, tmp_path):
    first = hub.add(NAME, repository, "main")
    client(NAME, "fetch", hub=hub)
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text("{}")
    write_valid(newer / "model.safetensors", z=("F32", [9]))
    second = hub.add(NAME, newer, "main")
    planned = client(NAME, hub=hub)["planned"]
    assert (second, ["z"], False) == (planned["revision"], [entry["name"] for entry in planned["entries"]], planned["complete"])
    assert first == client(f"{NAME}@{first}", hub=hub)["planned"]["revision"]


def test_a_branch_in_the_cache_is_used_when_the_hub_is_down_and_that_is_said(hub, client, repository):
    commit = hub.add(NAME, repository, "main")
    client(NAME, "fetch", hub=hub)
    hub.is_down = True
    told = client(NAME, hub=hub)
    assert (commit, True) == (told["planned"]["revision"], told["planned"]["complete"])
    assert commit in told["stderr"]


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/7", "commit"])
def test_tags_requests_and_commits_are_revisions(hub, client, repository, revision):
    commit = hub.add(NAME, repository, "v1.0", "refs/pr/7")
    told = client(f"{NAME}@{commit if revision == 'commit' else revision}", "fetch", hub=hub)
    assert commit == told["fetched"]["revision"]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_header_longer_than_the_first_request_is_fetched_whole(hub, client, tmp_path, knows_ranges):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = [f"model.layers.{n}.weight" for n in range(6000)]
    header = describe(**dict.fromkeys(names, ("F32", [1000])))
    raw = encode(header, 4000 * 6000)
    (folder / "model.safetensors").write_bytes(raw)
    hub.add(NAME, folder, "main")
    hub.knows_ranges = knows_ranges
    planned = client(NAME, hub=hub)["planned"]
    assert (names, False) == ([entry["name"] for entry in planned["entries"]], planned["complete"])
    if knows_ranges:
        assert hub.sent(".safetensors") < (1 << 17) + (len(raw) - 4000 * 6000)
    else:
        assert hub.sent(".safetensors") < len(raw), "a server without ranges is cut off when the header is there"


@pytest.mark.parametrize("raw", [b"", b"short", b"<html>not found</html>", encode(describe(w=("F32", [4])), 15)])
def test_a_broken_remote_file_is_told_while_planning(hub, client, tmp_path, raw):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(raw)
    hub.add(NAME, folder, "main")
    error = client(NAME, hub=hub)["error"]
    assert "model.safetensors" in error["path"]
    assert error["code"].startswith("ST-")


def test_a_shard_the_repository_lacks_is_told_while_planning(hub, client, repository):
    (repository / SHARDS[1]).unlink()
    hub.add(NAME, repository, "main")
    error = client(NAME, hub=hub)["error"]
    assert ("IX-MISSING", True) == (error["code"], SHARDS[1] in error["reason"])


def test_an_index_that_leaves_the_repository_fetches_nothing_from_there(hub, client, repository):
    index = repository / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../../other/model.safetensors"}}))
    hub.add(NAME, repository, "main")
    assert "IX-PATH" == client(NAME, hub=hub)["error"]["code"]
    assert 0 == hub.sent(".safetensors")


@pytest.mark.parametrize(
    ("reference", "prepare", "says"),
    [
        ("org/none", lambda hub: None, "does not exist, or is private"),
        (f"{NAME}@v9", lambda hub: None, "no such revision"),
        (NAME, lambda hub: hub.private.add(NAME), "HF_TOKEN"),
        (NAME, lambda hub: hub.gated.add(NAME), "gated"),
        (NAME, lambda hub: setattr(hub, "is_down", True), "answered with an error"),
    ],
    ids=["no repository", "no revision", "private", "gated", "down"],
)
def test_what_cannot_be_fetched_is_one_typed_error(hub, client, repository, reference, prepare, says):
    hub.add(NAME, repository, "main")
    prepare(hub)
    error = client(reference, hub=hub)["error"]
    assert ("SR-FETCH", "SourceError") == (error["code"], error["error"])
    assert says in error["text"]
    assert reference.partition("@")[0] in error["text"]


def test_a_token_opens_gated_and_private_repositories_and_is_never_told(hub, client, repository):
    hub.add(NAME, repository, "main")
    hub.gated.add(NAME)
    hub.private.add(NAME)
    told = client(NAME, "fetch", hub=hub, HF_TOKEN=hub.token)
    assert told["fetched"]["complete"]
    wrong = client("org/none", hub=hub, HF_TOKEN=hub.token)
    assert hub.token not in wrong["error"]["text"]


def test_a_hub_that_is_not_there_is_unreachable(client):
    error = client(NAME, hub=Hub(url="http://127.0.0.1:9"))["error"]
    assert ("SR-FETCH", True) == (error["code"], "cannot be reached" in error["reason"])


def test_offline_and_not_cached_says_so(client):
    error = client(NAME)["error"]
    assert "SR-FETCH" == error["code"]
    assert "not in the local cache" in error["reason"]
    assert "HF_HUB_OFFLINE" in error["hint"]


def test_offline_and_cached_in_part_names_what_is_missing(hub, client, repository):
    hub.add(NAME, repository, "main")
    client(NAME, hub=hub)
    error = client(NAME)["error"]
    assert ("SR-FETCH", True) == (error["code"], f"without {', '.join(SHARDS)}" in error["reason"])


def test_an_interrupted_cache_is_completed(hub, client, repository):
    hub.add(NAME, repository, "main")
    root = Path(client(NAME, "fetch", hub=hub)["fetched"]["root"])
    (root / SHARDS[0]).resolve().unlink()
    (root / SHARDS[0]).unlink()
    hub.seen.clear()
    assert client(NAME, "fetch", hub=hub)["fetched"]["complete"]
    assert hub.sent(SHARDS[1]) <= 1 << 17, "the shard that was there is not downloaded again"


def test_a_file_that_is_not_the_planned_one_is_refused(hub, client, repository, tmp_path):
    hub.add(NAME, repository, "main")
    other = write_valid(tmp_path / "other.safetensors", c=("I8", [8_000_000]))
    error = client(NAME, "fetch", other, repository / SHARDS[1], hub=hub)["error"]
    assert ("IO-CHANGED", True) == (error["code"], error["path"].endswith(SHARDS[1]))


def test_ctrl_c_ends_a_download_at_once_and_leaves_what_can_be_continued(hub, client, repository, tmp_path):
    hub.add(NAME, repository, "main")
    hub.pause_seconds = 0.2
    surroundings = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    surroundings.pop("HF_HUB_OFFLINE", None)
    child = subprocess.Popen(
        [sys.executable, "-c", CLIENT, NAME, "fetch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=surroundings, text=True
    )
    deadline = time.monotonic() + 20
    while not list((tmp_path / "home").rglob("*.incomplete")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    told = child.communicate(timeout=20)
    assert "KeyboardInterrupt" in told[1]
    assert time.monotonic() - stopped < 3, "a whole shard would take half a minute"
    hub.pause_seconds = 0
    assert client(NAME, "fetch", hub=hub)["fetched"]["complete"]


def test_a_repository_without_safetensors_is_said_to_have_none_and_what_it_has(hub, client, repository):
    for path in repository.glob("*.safetensors*"):
        path.unlink()
    hub.add(NAME, repository, "main")
    error = client(NAME, hub=hub)["error"]
    assert ("SR-FETCH", True) == (error["code"], "pytorch_model.bin" in error["reason"])
    assert 0 == hub.sent(".bin")


# ---------------------------------------------------------------------------------------------- variants


@pytest.fixture
def variants(repository):
    """The repository, with its tensors in half the bytes too, as one file and as a sharded one."""
    write_valid(repository / "model.fp16.safetensors", a=("F16", [2, 3]), b=("F16", [50]))
    shard = "model.bf16-00001-of-00001.safetensors"
    write_valid(repository / shard, a=("BF16", [2, 3]))
    (repository / "model.safetensors.index.bf16.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    return repository


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_only_the_files_of_a_variant_are_planned_and_fetched(hub, client, variants, variant, dtype):
    hub.add(NAME, variants, "main")
    told = client(f"{NAME}#{variant}", "fetch", hub=hub)
    assert {dtype} <= {entry["dtype"] for entry in told["planned"]["entries"]} == {dtype}
    assert (False, True) == (told["planned"]["complete"], told["fetched"]["complete"])
    assert [name for name in told["fetched"]["files"] if name.endswith(".safetensors")] == [
        path.name for path in variants.glob(f"model.{variant}*.safetensors")
    ]
    offline = client(f"{NAME}#{variant}", "fetch")
    assert told["fetched"]["entries"] == offline["planned"]["entries"]
    assert "SR-FETCH" == client(NAME)["error"]["code"]  # the files without a mark were never fetched
    plain = client(NAME, hub=hub)["planned"]
    assert (False, {"float32", "bfloat16", "uint8"}) == (plain["complete"], {entry["dtype"] for entry in plain["entries"]})


def test_a_variant_the_repository_lacks_is_told_with_those_it_has(hub, client, variants):
    hub.add(NAME, variants, "main")
    error = client(f"{NAME}#fp8", hub=hub)["error"]
    assert ("SR-FETCH", "ask for a variant that is there: bf16, fp16") == (error["code"], error["hint"])
    for path in (*variants.glob("model-*"), variants / "model.safetensors.index.json", variants / "pytorch_model.bin"):
        path.unlink()
    assert "bf16, fp16" in client(NAME, hub=hub)["error"]["hint"]


def test_a_bin_checkpoint_that_was_downloaded_is_planned_without_fetching(hub, client, tmp_path, repository):
    from huggingface_hub.file_download import repo_folder_name

    for path in repository.glob("model*"):
        path.unlink()
    commit = hub.add(NAME, repository, "main")
    assert "SR-FETCH" == client(NAME, hub=hub)["error"]["code"]
    folder = tmp_path / "home" / "hub" / repo_folder_name(repo_id=NAME, repo_type="model") / "snapshots" / commit
    (folder / "pytorch_model.bin").write_bytes((repository / "pytorch_model.bin").read_bytes())
    (repository / "training_args.bin").write_bytes(b"never fetched")
    code = f"""
import sys; sys.modules["torch"] = None
from modelrig_plugins.sources.hub import HubPlanner
print(HubPlanner.resolve({NAME!r}).complete)
"""
    surroundings = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=surroundings, check=False)
    assert "True" == done.stdout.strip(), done.stderr


# ---------------------------------------------------------------------------------------------- a cache made by hand


def write_cache(home: Path, commit: str = "c" * 40, **files: bytes) -> Path:
    """A repository as the hub's library keeps it: blobs, snapshots that link to them, and a ref that names a snapshot."""
    repository = home / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", snapshot, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(files.items()):
        (repository / "blobs" / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def valid_bytes() -> bytes:
    return encode(describe(w=("F32", [4])), 16)


def test_a_cache_is_read_without_a_hub(tmp_path, client):
    snapshot = write_cache(tmp_path / "home", **{"config.json": b"{}", "model.safetensors": valid_bytes()})
    planned = client(NAME, "fetch")["planned"]
    assert (str(snapshot), "c" * 40, True, [True]) == (
        planned["root"], planned["revision"], planned["complete"], planned["identified"],
    )  # fmt: skip


def test_a_link_of_the_cache_that_leads_elsewhere_is_refused(tmp_path, client):
    snapshot = write_cache(tmp_path / "home", **{"config.json": b"{}", "model.safetensors": valid_bytes()})
    (tmp_path / "elsewhere").write_bytes(valid_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "IO-PATH" == client(NAME)["error"]["code"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_a_cache_of_another_format_is_complete_for_a_format_that_reads_it(tmp_path, name):
    from modelrig_plugins.sources.hub import missing_files

    assert [] == missing_files(write_cache(tmp_path, **{"config.json": b"{}", name: b"x"}))
    assert ["config.json", "tensor files"] == missing_files(write_cache(tmp_path, "d" * 40, **{"README.md": b""}))


def test_the_variables_of_the_hub_choose_the_cache(tmp_path, client):
    snapshot = write_cache(tmp_path / "another", **{"config.json": b"{}", "model.safetensors": valid_bytes()})
    assert str(snapshot) == client(NAME, HF_HUB_CACHE=str(tmp_path / "another" / "hub"))["planned"]["root"]


def test_looking_at_references_imports_no_hub_library():
    code = (
        "import sys; import modelrig_plugins.sources; from modelrig_plugins.sources.hub import HubPlanner;"
        "assert HubPlanner.claims('org/name'); assert 'huggingface_hub' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
