"""What the hub source does over the network: headers by range requests, and the library's errors in our words.

Sessions, URLs, tokens, endpoint and retries are those of huggingface_hub, which is imported when it is first needed.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from modelrig.checkpoint.headers import header_bytes
from modelrig.errors import ModelrigError, SourceError

CONNECTIONS = 8
TIMEOUT_SECONDS = 10.0
RETRIES = 2
FIRST_BYTES = 1 << 17  # holds nearly every header, so that one request is enough

#: huggingface_hub's error, from special to general → what it means here, what to do. Looked up by name along the error's bases.
_MEANINGS = {
    "GatedRepoError": (
        "is gated: access must be granted first",
        "accept its terms on its page, then `hf auth login` or set HF_TOKEN",
    ),
    "DisabledRepoError": ("was disabled by the hub", None),
    "RevisionNotFoundError": ("has no such revision", "a branch, a tag or a whole commit hash follows the @"),
    "RepositoryNotFoundError": (
        "does not exist, or is private",
        "look at the spelling; for a private repository `hf auth login` or set HF_TOKEN",
    ),
    "RemoteEntryNotFoundError": ("lacks a file that it lists", None),
    "OfflineModeIsEnabled": ("is not all in the local cache, and the hub is offline", "unset HF_HUB_OFFLINE to fetch it"),
    "HFValidationError": ("is not a possible name of a repository", None),
    "HfHubHTTPError": ("cannot be fetched: the hub answered with an error", None),
}


@contextmanager
def explained(repository: str, revision: str) -> Iterator[None]:
    """Re-raise whatever huggingface_hub and the HTTP library under it raise as one `SourceError`, SR-FETCH."""
    try:
        yield
    except ModelrigError:
        raise
    except Exception as error:
        chain = [error, error.__cause__, error.__context__]  # the library wraps the reason into "not found in the cache"
        names = [kind.__name__ for link in chain if link is not None for kind in type(link).__mro__]
        unreachable = ("cannot be fetched: the hub cannot be reached", "look at the network, HF_ENDPOINT and the proxy settings")
        meaning, hint = next((_MEANINGS[name] for name in names if name in _MEANINGS), unreachable)
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise SourceError("SR-FETCH", f"{repository}@{revision} {meaning} ({detail})", hint=hint) from error


@cache
def _headers_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="modelrig-headers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def fetch_header(repository: str, commit: str, name: str) -> tuple[int, Path]:
    """Fetch the beginning of a tensor file with its header: (size of the whole file, the folder its beginning was put into)."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository, name, revision=commit)
    folder = _headers_folder() / repository / commit
    folder.mkdir(parents=True, exist_ok=True)
    head, size = _read_range(url, 0, FIRST_BYTES)
    needed = header_bytes(head, size)
    if needed > len(head):
        head += _read_range(url, len(head), needed)[0]
    (folder / name).write_bytes(head[:needed])
    return size, folder


def _read_range(url: str, begin: int, end: int) -> tuple[bytes, int]:
    """Bytes [begin, end) of a file as far as it has them, and its size. Reads no more even if the server would send all of it."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    headers = {**build_hf_headers(library_name="modelrig"), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT_SECONDS, max_retries=RETRIES) as response:
        if response.status_code == 416:  # an empty file has no first byte
            return b"", 0
        hf_raise_for_status(response)
        whole = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers.get("Content-Length", "")
        if not whole.isdecimal():
            raise SourceError("SR-FETCH", "the server does not say how large the file is", path=url)
        skip = 0 if response.status_code == 206 else begin  # a server that knows no ranges sends the file from its beginning
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skip + end - begin:
                break
        return bytes(data[skip : skip + end - begin]), int(whole)


def meter(report: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> type[Any]:
    """A progress bar class for huggingface_hub that shows nothing: `report` gets the bytes added; `stop` ends the download."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Meter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self.update(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            if stop is not None and stop.is_set():
                raise InterruptedError("the download was stopped")
            if report is not None and n:
                report(int(n))

    return Meter
