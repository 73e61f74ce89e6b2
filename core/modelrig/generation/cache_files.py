"""Caches in files: what one holds as tensors of a safetensors file, what it belongs to as the file's metadata.

A file goes with the checkpoint (told by a fingerprint, wherever its folder is), the quantizer of its weights, the kind of cache and
the dtype. The tensors `cache.*` are what the cache exported; a session adds its token ids, and its messages as metadata.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modelrig.checkpoint.files import identity, open_regular, read_at
from modelrig.checkpoint.fingerprint import fingerprint
from modelrig.checkpoint.headers import Header, read_header
from modelrig.checkpoint.saving.vfs import OperationError, Vfs
from modelrig.checkpoint.strict_json import parse
from modelrig.errors import CacheError, CheckpointError, quoted

if TYPE_CHECKING:
    from modelrig.components import Cache
    from modelrig.generation.session import Session
    from modelrig.planning.plan import RigPlan

FORMAT, VERSION = "modelrig cache", "1"
TENSORS, TOKENS, MESSAGES = "cache.", "session.tokens", "messages"


def belongs_to(plan: RigPlan) -> dict[str, str]:
    """What a cache of `plan` goes with, by names that a message can use."""
    quantizer, layers = plan.choices["quantizers"], plan.facts.cached_layers
    kinds = [(one, layers.count(one)) for one in dict.fromkeys(layers)]
    return {
        "architecture": plan.facts.architecture,
        "layers": ", ".join(
            f"{count} of {one.num_key_value_heads} heads of {one.head_dim} and {one.value_dim}"
            + (f" in a window of {one.window}" if one.window else "")
            for one, count in kinds
        ),
        "cache": plan.choices["caches"].id,
        "dtype": plan.dtype,
        "quantizer": quantizer.id,
        "checkpoint": fingerprint(plan.catalog),
    }


def save_cache(
    plan: RigPlan,
    cache: Cache,
    path: str | os.PathLike[str],
    tokens: Sequence[int] | None = None,
    messages: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write what `cache` holds: the whole file, durably, or nothing. See `modelrig.Model.save_cache`."""
    target = _path(path)
    try:
        metadata = {"format": FORMAT, "version": VERSION, **belongs_to(plan), MESSAGES: json.dumps(list(messages), allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise CacheError("CA-FILE", f"messages that JSON cannot hold: {error}", path=target) from error
    except CheckpointError as error:
        raise CacheError("CA-FILE", f"what the cache belongs to cannot be told: {error}", path=target) from error
    tensors = {TENSORS + name: tensor.cpu() for name, tensor in cache.export().items()}
    if tokens is not None:
        tensors[TOKENS] = torch.tensor(tokens, dtype=torch.int64)
    vfs, beside = Vfs(), target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            vfs.close(vfs.create(beside), beside)  # fails as any file would: no folder, no right, no room
            save_file(tensors, beside, metadata)
            _sync(vfs, beside, os.O_RDWR)
            vfs.rename(beside, target)
        except BaseException:
            with contextlib.suppress(OperationError):
                vfs.unlink(beside)
            raise
        _sync(vfs, target.parent, os.O_RDONLY)
    except (OSError, SafetensorError) as error:
        raise CacheError("CA-FILE", f"cannot be written: {getattr(error, 'strerror', None) or error}", path=target) from error
    return target


def load_cache(plan: RigPlan, path: str | os.PathLike[str], make: Callable[[int], Cache]) -> Cache:
    """A cache, made by `make(batch)`, that goes on from the file. See `modelrig.Model.load_cache`."""
    source = _path(path)
    tensors, _ = _read_ours(plan, source)
    tensors.pop(TOKENS, None)
    padding = tensors.get(TENSORS + "padding")
    if padding is None or padding.dim() != 1 or not len(padding):
        raise CacheError("CA-FILE", "it does not say how many rows there are", path=source, locus=f"{TENSORS}padding")
    cache = make(len(padding))
    _adopt(cache, tensors, source)
    return cache


def load_session(plan: RigPlan, path: str | os.PathLike[str], session: Session) -> None:
    """Let `session` go on from the file of another one."""
    source = _path(path)
    tensors, metadata = _read_ours(plan, source)
    ids, messages = tensors.pop(TOKENS, None), _messages(metadata.get(MESSAGES, "[]"), source)
    length = tensors.get(f"{TENSORS}length")
    size = plan.facts.vocab_size
    is_right = ids is not None and ids.dtype == torch.int64 and ids.dim() == 1
    if ids is None or not is_right or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size):
        raise CacheError("CA-FILE", f"a session's ids of a vocabulary of {size:,} are needed", path=source, locus=TOKENS)
    if length is not None and length.dtype == torch.int64 and length.numel() == 1 and int(length) > len(ids):
        text = f"{len(ids)} ids, but {int(length)} tokens in the cache"
        raise CacheError("CA-FILE", text, path=source, locus=TOKENS)
    _adopt(session.cache, tensors, source)
    session.tokens, session.messages = ids.tolist(), messages


def _read_ours(plan: RigPlan, path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a file that goes with `plan`."""
    try:
        header = read_header(path)
        _require_ours(header.metadata, plan, path)
        return _read(header, path), header.metadata
    except CheckpointError as error:
        raise CacheError("CA-FILE", f"cannot be read: {error}", path=path, hint=error.hint) from error


def _adopt(cache: Cache, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        cache.adopt({name.removeprefix(TENSORS): tensor for name, tensor in tensors.items()})
    except CacheError as error:
        if error.code == "CA-FULL":
            raise CacheError("CA-FULL", error.reason, path=path, locus=error.locus, hint="give a larger max_len") from error
        raise CacheError("CA-FILE", error.reason, path=path, locus=error.locus, hint=error.hint) from error


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CacheError("CA-FILE", f"{quoted(path)} is not the path of a file: {error}") from error


def _sync(vfs: Vfs, path: Path, flags: int) -> None:
    descriptor = vfs.open(path, flags)
    try:
        vfs.fsync(descriptor, path)
    finally:
        vfs.close(descriptor, path)


def _require_ours(metadata: Mapping[str, str], plan: RigPlan, path: Path) -> None:
    """Whether the file is a cache's, and of such a rig."""
    if metadata.get("format") != FORMAT:
        raise CacheError("CA-FILE", "it is not a cache that was saved", path=path)
    if metadata.get("version") != VERSION:
        text = f"version {quoted(metadata.get('version'))} of saved caches; {VERSION} is known"
        raise CacheError("CA-FILE", text, path=path)
    for name, ours in belongs_to(plan).items():
        if metadata.get(name) != ours:
            text = f"it belongs to another {name}: {quoted(metadata.get(name))}, where this model has {quoted(ours)}"
            raise CacheError("CA-FILE", text, path=path, locus=name, hint="prefill it again with this model")


def _read(header: Header, path: Path) -> dict[str, Tensor]:
    """Every tensor of the file; all sizes were checked against that of the file."""
    tensors = {}
    with open_regular(path) as (descriptor, status):
        if identity(status) != header.identity:
            raise CacheError("CA-FILE", "it changed while it was read", path=path)
        for name, entry in header.entries.items():
            dtype = getattr(torch, entry.dtype, None)
            if dtype is None:
                raise CacheError("CA-FILE", f"torch has no {entry.dtype}", path=path, locus=name)
            tensor = torch.empty(entry.shape, dtype=dtype)
            if entry.nbytes:
                data = read_at(descriptor, entry.nbytes, entry.offset, path)
                if len(data) != entry.nbytes:
                    raise CacheError("CA-FILE", "it changed while it was read", path=path)
                tensor = torch.frombuffer(bytearray(data), dtype=dtype).view(entry.shape)
            tensors[name] = tensor
    return tensors


def _messages(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        messages = parse(text.encode())
    except ValueError as error:
        raise CacheError("CA-FILE", f"not the JSON it should be: {error}", path=path, locus=MESSAGES) from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise CacheError("CA-FILE", "a list of messages is needed", path=path, locus=MESSAGES)
    return messages
