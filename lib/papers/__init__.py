"""The papers that are rebuilt on the library: one folder each, and what they share in ``common``.

A study of one's own lies outside of this checkout, in the folder ``papers`` where the user stands, and is found as if
it lay here (``papers/mine/study.py`` is ``papers.mine.study``).
"""

from pathlib import Path

_own = Path.cwd() / "papers"
if _own.is_dir() and _own.resolve() != Path(__file__).resolve().parent:
    __path__.append(str(_own))
