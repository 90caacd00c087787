"""Obtaining a data set: sources in order, each result checked, the first good one stored."""

from __future__ import annotations

import importlib
import inspect
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curvspace.datasets import sources as source_module
from curvspace.datasets.catalogue import KNOWN, Known, source_names
from curvspace.datasets.generated import gaussian_mixture, sine
from curvspace.datasets.imagefolder import imagefolder
from curvspace.datasets.sources import SourceError
from curvspace.datasets.store import Arrays, WrongData, make_card, require_own, save
from curvspace.errors import refuse_text

log = logging.getLogger(__name__)
DIGITS_SHA256 = "b25fba4c9a98f3a97f34fbeab41843a6e3565a3dcac452cd2525d019a0fcc93b"
DEFAULT_ORDER = ("torchvision", "npm", "debian", "folder")


class DataUnavailable(RuntimeError):
    """No source could provide the data set; the message says which were tried and why each failed.

    ``failures``: the error of each source that was tried, by its name.
    """

    def __init__(self, message: str, failures: Mapping[str, Exception]):
        super().__init__(message)
        self.failures = dict(failures)


def prepare(
    name: str,
    out_dir: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    sources: Sequence[str] = DEFAULT_ORDER,
    offline: bool = False,
    folder: str | Path | None = None,
) -> dict[str, Any]:
    """Obtain a data set and write ``arrays.npz`` and ``card.json`` into ``out_dir``; returns the card.

    Parameters
    ----------
    name
        A public set (mnist, fashion-mnist, cifar10, cifar100), ``digits`` (embedded in scikit-learn),
        ``gaussian-mixture`` or ``sine`` (generated), ``imagefolder`` (a user's own images), or ``module:function``:
        a user's function of ``options`` that returns :class:`~curvspace.datasets.store.Arrays`.
    options
        Keyword arguments of a generated, ``imagefolder`` or user's own set; public sets have none.
    sources
        Order in which the sources of a public set are tried: torchvision, npm, debian, folder.
    offline
        Use only what needs no network.
    folder
        A local folder with original files, for the source ``folder``.

    Raises
    ------
    DataUnavailable
        If no source of a public set served.
    WrongData
        If a user's own images are missing or unreadable.
    ValueError
        If the name, a source or an option is unknown.
    UserError
        If files that are no prepared data set's stand where it would be written.
    """
    require_own(out_dir)
    options = dict(options or {})
    if unknown := [source for source in sources if source not in source_module.SOURCES]:
        raise ValueError(f"unknown data source {unknown[0]!r}; known are {', '.join(source_module.SOURCES)}")
    if name in KNOWN:
        if options:
            raise ValueError(f"{name} takes no options when it is prepared, got {sorted(options)}")
        order = [source for source in sources if not offline or source in source_module.WITHOUT_NETWORK]
        arrays, served = _first_that_serves(KNOWN[name], order, Path(folder).expanduser() if folder else None, offline)
    else:
        function = _maker(name)
        try:
            inspect.signature(function).bind(**options)
        except TypeError as error:
            raise ValueError(f"data set {name!r} does not take the options {options}: {error}") from None
        refuse_text(f"data set {name!r}", function, options)
        arrays, served = function(**options), {"digits": "scikit-learn"}.get(name, "made here")
        if not isinstance(arrays, Arrays):
            raise ValueError(f"{name} must return curvspace.datasets.store.Arrays, got {type(arrays).__name__}")
        if name == "imagefolder":
            served = str(options["folder"])
    card = make_card(name, arrays, served, options)
    save(out_dir, arrays, card)
    log.info("%s: %d + %d examples from %s", name, card["train"], card["test"], served)
    return card


def _first_that_serves(known: Known, order: Sequence[str], folder: Path | None, offline: bool) -> tuple[Arrays, str]:
    failures: dict[str, Exception] = {}
    for source in order:
        scratch = Path(tempfile.mkdtemp(prefix="curvspace-data-"))
        try:
            return source_module.SOURCES[source](known, scratch, folder), source
        except (SourceError, WrongData) as error:
            failures[source] = error
            log.warning("%s: %s cannot serve: %s", known.name, source, error)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    tried = "".join(f"\n  {source}: {reason}" for source, reason in failures.items())
    only = " that needs no network (data.offline is true)" if offline else ""
    raise DataUnavailable(
        f"no source{only} could provide {known.name}; tried:{tried or ' none'}\n"
        "Without a network, put the original files into a folder and set data.folder, or run the study on the "
        "embedded digits: make smoke",
        failures,
    )


def digits() -> Arrays:
    """scikit-learn's embedded 8×8 digits: 1,797 images, of which every fifth of each class makes the test set.

    The 17 grey levels 0 … 16 are spread over 0 … 255.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[:, None]
    targets = bundle.target.astype(np.int64)
    test = np.zeros(len(targets), dtype=bool)
    for label in range(10):  # class by class: the classes follow each other with periods of five and ten
        test[np.flatnonzero(targets == label)[4::5]] = True
    arrays = Arrays(images[~test], targets[~test], images[test], targets[test], num_classes=10)
    if arrays.digest() != DIGITS_SHA256:
        raise WrongData("scikit-learn's digits are not the known ones: its installation is damaged or changed")
    return arrays


def _maker(name: str) -> Callable[..., Arrays]:
    makers: dict[str, Callable[..., Arrays]] = {
        "digits": digits,
        "gaussian-mixture": gaussian_mixture,
        "sine": sine,
        "imagefolder": imagefolder,
    }
    if name in makers:
        return makers[name]
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(source_names())}, or 'module:function'")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise  # the user's module exists; something that it imports does not
        raise ValueError(f"data set {name!r}: there is no module {module_name!r} on Python's path") from error
    except AttributeError as error:
        raise ValueError(f"data set {name!r}: module {module_name!r} has no function {function_name!r}") from error
