"""Data that many unit tests share: scikit-learn's embedded digits, prepared once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from curvspace.datasets import prepare

    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder, offline=True)
    return folder
