"""An exception keeps the frames it passed, and these the weights: notebooks keep the last one, which must not hold gigabytes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def forgets_frames(function: Callable[P, R]) -> Callable[P, R]:
    """An error that leaves `function` says where it was, and holds none of what was there."""

    @wraps(function)
    def calls(*args: P.args, **kwargs: P.kwargs) -> R:
        handled = sys.exception()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            forget_frames(error, handled)
            raise

    return calls


def forget_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """Clear the frames of `error` and its causes, except `handled`: what the caller was handling already."""
    while error is not None and error is not handled:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
