"""What many unit tests share: the embedded digits, and a machine with tiny data sets and no client programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from curvspace.datasets.catalogue import Known
    from curvspace.datasets.store import Arrays


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from curvspace.datasets import prepare

    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder, offline=True)
    return folder


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Arrays, Known]]:
    """Make the tiny arrays the ones that are expected under a name."""
    import source_files as files

    from curvspace.datasets.catalogue import KNOWN

    def register(name: str) -> tuple[Arrays, Known]:
        arrays, known = files.tiny(name)
        monkeypatch.setitem(KNOWN, name, known)
        return arrays, known

    return register


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine without any client program; scratch folders are made where they can be counted."""
    programs, scratch = tmp_path / "programs", tmp_path / "scratch"
    programs.mkdir()
    scratch.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield programs
    assert list(scratch.glob("curvspace-*")) == []  # nothing partial is left
