"""Says of each test which architecture it is about: `docs/architectures.py` makes a page of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def architecture(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """The `model_type` of the reference that fixture `pair` made, or of the class prefix that `family` is."""
    if "pair" in request.fixturenames:
        record_property("architecture", request.getfixturevalue("pair")[0].config.model_type)
    elif "family" in request.fixturenames:
        import transformers

        config = getattr(transformers, f"{request.getfixturevalue('family')}Config")
        record_property("architecture", config.model_type)
    elif request.path.stem == "test_bert":
        record_property("architecture", "bert")
