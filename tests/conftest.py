"""What all tests share: signing keys that lie apart from the user's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMANENCE_CONFIG", str(tmp_path_factory.mktemp("config")))
        yield
