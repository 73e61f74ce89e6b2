"""hub: `org/name[@revision]` on the Hugging Face Hub, through the hub's own library, its cache and its environment variables.

Planning downloads no weights. A snapshot that is complete in the cache is used as it is; else the small files are downloaded
into the cache, and of the tensor files only their headers, into a folder that goes when the process ends.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modelrig.checkpoint.catalog import TENSOR_SUFFIXES
from modelrig.checkpoint.index import read_index
from modelrig.checkpoint.layout import FileNames
from modelrig.checkpoint.paths import name_problem
from modelrig.components import Snapshot
from modelrig.errors import CheckpointError, SourceError, quoted
from modelrig_plugins.formats import pytorch_bin, safetensors
from modelrig_plugins.sources import hub_remote
from modelrig_plugins.sources.local import blobs_of, existing_path

NAME = "hub"
SMALL_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken")
SMALL_NAMES = ("merges.txt", "vocab.txt")
SMALL_BYTES = 100_000_000
TEMPLATES = "additional_chat_templates/"
_STEP = re.compile(r"[0-9]{1,3}_[A-Za-z]{1,64}/config\.json", re.ASCII)  # of sentence-transformers
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")

_REFERENCE = re.compile(r"(?!.*\.\.)([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?:@([^\s@]{1,250}))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_logger = logging.getLogger("modelrig.sources.hub")


def split_reference(reference: str) -> tuple[str, str] | None:
    """`org/name[@revision]` → (repository, revision), or None if it is not written like that."""
    found = _REFERENCE.fullmatch(reference)
    return None if found is None else (found[1], found[2] or "main")


class HubPlanner:
    @staticmethod
    def claims(reference: str) -> str | None:
        """That it is written as org/name[@revision], unless a path of that name exists."""
        parts = split_reference(reference)
        return None if parts is None or existing_path(reference) is not None else f"{parts[0]} on the hub, revision {parts[1]}"

    @staticmethod
    def resolve(reference: str) -> Snapshot:
        """`resolve_variant` for the files without such a mark."""
        return HubPlanner.resolve_variant(reference, None)

    @staticmethod
    def resolve_variant(reference: str, variant: str | None) -> Snapshot:
        """Configs in the hub's cache, tensor files of the variant there too or their headers beside.

        Raises:
            SourceError: SR-FETCH: no such repository or revision, gated, offline and not cached, not reachable.
        """
        from huggingface_hub import is_offline_mode
        from huggingface_hub.errors import RevisionNotFoundError

        parts = split_reference(reference)
        if parts is None:
            raise SourceError("SR-UNKNOWN", f"{quoted(reference)} is not written as org/name or org/name@revision")
        repository, revision = parts
        cached = _cached_folder(repository, revision)
        missing = None if cached is None else missing_files(cached, variant)
        if cached is not None and not missing and (is_offline_mode() or _is_settled(cached, revision)):
            return _snapshot(reference, cached)
        if is_offline_mode():
            raise _not_cached(reference, cached, missing or [])
        try:
            return _resolve_online(reference, repository, revision, variant)
        except SourceError as error:
            if cached is None or missing or isinstance(error.__cause__, RevisionNotFoundError):
                raise
            _logger.warning("%s: %s; the cached commit %s is used", reference, error.reason, cached.name)
            return _snapshot(reference, cached)


def choose(names: Iterable[str], variant: str | None) -> tuple[FileNames, str] | None:
    """The format that has the claim on a folder with these files, and the one it would start from."""
    names = list(names)
    for files, first_file in ((safetensors.FILES, safetensors.first_file), (pytorch_bin.FILES, pytorch_bin.first_file)):
        first = first_file(names, variant)
        if first is not None:
            return files, first
    return None


def _variants(names: Iterable[str]) -> list[str]:
    names = list(names)
    return sorted({*safetensors.FILES.variants(names), *pytorch_bin.FILES.variants(names)})


def missing_files(folder: Path, variant: str | None = None) -> list[str]:
    """Names of the files without which the checkpoint in `folder` cannot be loaded."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    needed = [] if "config.json" in names else ["config.json"]
    chosen = choose(names, variant)
    if chosen is None:
        if variant is not None:
            return [*needed, f"tensor files of the variant {variant}"]
        is_plain = not _variants(names) and any(name.endswith(TENSOR_SUFFIXES) for name in names)
        return needed if is_plain else [*needed, "tensor files"]
    files, first = chosen
    if first == files.index(variant):
        try:
            shards = read_index(folder / first, suffix=files.suffix).shards
        except CheckpointError:
            return needed  # there is nothing more to fetch; the catalog says what is wrong with it
        needed.extend(shard for shard in shards if shard not in names)
    return needed


def _snapshot(reference: str, folder: Path, **more: Any) -> Snapshot:
    return Snapshot(reference=reference, root=folder, source=NAME, revision=folder.name, link_roots=blobs_of(folder), **more)


def _cached_folder(repository: str, revision: str) -> Path | None:
    """The snapshot folder of this revision as far as the cache knows it."""
    from huggingface_hub import try_to_load_from_cache

    with hub_remote.explained(repository, revision):
        found = (
            try_to_load_from_cache(repository, name, revision=revision)
            for name in ("config.json", safetensors.FILES.index(), safetensors.FILES.single())
        )
        return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _is_settled(folder: Path, revision: str) -> bool:
    """Whether asking the hub could change nothing: a commit never moves, and its tokenizer is here too."""
    return _COMMIT.fullmatch(revision) is not None and any((folder / name).exists() for name in TOKENIZERS)


def _not_cached(reference: str, cached: Path | None, missing: list[str]) -> SourceError:
    listed = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    state = "not in the local cache" if cached is None else f"in the local cache without {listed}"
    hint = "unset HF_HUB_OFFLINE to fetch it, or look whether HF_HOME is the right folder"
    return SourceError("SR-FETCH", f"{reference} is {state}, and the hub is offline", path=cached, hint=hint)


def _resolve_online(reference: str, repository: str, revision: str, variant: str | None) -> Snapshot:
    from huggingface_hub import HfApi, hf_hub_download

    with hub_remote.explained(repository, revision), ThreadPoolExecutor(hub_remote.CONNECTIONS) as pool:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=hub_remote.TIMEOUT_SECONDS)
        files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        commit = info.sha
        if commit is None or not _COMMIT.fullmatch(commit):
            raise SourceError("SR-FETCH", f"the hub names no commit for {repository}@{revision}, but {quoted(commit)}")

        def download(name: str, revision: str = commit) -> Path:
            return Path(hf_hub_download(repository, name, revision=revision, tqdm_class=hub_remote.meter()))

        small = sorted(name for name, size in files.items() if _is_small(name, size))
        if all("/" in name for name in small):
            raise SourceError("SR-FETCH", f"{repository}@{revision} has no config.json nor another JSON file")
        if revision != commit:
            download(small[0], revision)  # by its name, so that the cache knows later, offline, which commit the name meant
        paths = dict(zip(small, pool.map(download, small), strict=True))
        folder = next(path.parent for name, path in paths.items() if "/" not in name)
        tensors = _tensor_files(repository, folder, files, variant)
        if all((folder / name).exists() for name in tensors):
            return _snapshot(reference, folder)
        headers = dict(pool.map(lambda name: (name, hub_remote.fetch_header(repository, commit, name)), tensors))
        return _snapshot(reference, folder, complete=False, headers=headers)


def _is_small(name: str, size: int) -> bool:
    """Configs, tokenizer, templates and indexes of the repository's top folder: all that planning reads beside headers; and what
    says how its texts are embedded."""
    if size > SMALL_BYTES:
        return False
    if _STEP.fullmatch(name):
        return True
    if name.startswith(TEMPLATES):
        return name.endswith(".jinja") and name_problem(name.removeprefix(TEMPLATES)) is None
    return name_problem(name) is None and (name.endswith(SMALL_SUFFIXES) or name in SMALL_NAMES)


def _tensor_files(repository: str, folder: Path, files: dict[str, int], variant: str | None) -> list[str]:
    """Names of the repository's files that hold the checkpoint's tensors, as the format would choose them."""
    names = [name for name in files if name_problem(name) is None]
    needed = others = [name for name in names if name.endswith(TENSOR_SUFFIXES)]
    chosen = choose(names, variant)
    if chosen is not None:
        format_, first = chosen
        is_index = first == format_.index(variant)
        needed = [first]
        if is_index:
            needed = [shard for shard in read_index(folder / first, suffix=format_.suffix).shards if shard in files]
        if format_ == safetensors.FILES:
            return needed
    if needed and (chosen is not None or variant is None) and all((folder / name).exists() for name in needed):
        return needed
    there = ", ".join(others[:10]) or "none"
    hint = f"`hf download {repository}` fetches all of it; then a format that reads those files can plan" if others else None
    if chosen is None and (variants := [mark for mark in _variants(names) if mark != variant]):
        hint = f"ask for a variant that is there: {', '.join(variants)}"
    what = "no safetensors file" if variant is None else f"no safetensors file of the variant {variant!r}"
    raise SourceError("SR-FETCH", f"{repository} has {what} to plan from; tensor files there: {there}", hint=hint)
