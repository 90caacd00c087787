"""Draws which part of the repository leans on which: ``python -m workflow.dependencies docs/dependencies.svg``.

A part is a package, or the modules of a package that lie in no folder of it. Nothing is imported; parts that lean on
each other are one box, and an arrow that others imply is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow.invalidation import Code

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"workflow": "#fde0c5", "papers": "#d9ead3", "curvspace": "#d6e4f5"}


def parts(root: Path = ROOT) -> dict[str, set[str]]:
    """Part -> the parts that its modules import."""
    code = Code(root / "lib", root)
    found: dict[str, set[str]] = {}
    for package, base in (("curvspace", root / "lib"), ("papers", root / "lib"), ("workflow", root)):
        for file in sorted((base / package).rglob("*.py")):
            if file.name != "__init__.py" and "study_template" not in file.parts:
                name = ".".join(file.relative_to(base).with_suffix("").parts)
                needed = {_part(n) for n in code.imports(name) if not code.is_index(n)}
                found.setdefault(_part(name), set()).update(needed - {_part(name)})
    return found


def _part(module: str) -> str:
    names = module.split(".")
    return ".".join(names[:2]) if len(names) > 2 else names[0]


def draw(found: dict[str, set[str]], out: Path) -> None:
    """An SVG file, the same bytes for the same parts."""
    import matplotlib
    import networkx as nx
    from matplotlib.figure import Figure

    graph = nx.DiGraph([(part, other) for part, others in found.items() for other in others])
    graph.add_nodes_from(found)
    boxes = nx.condensation(graph)
    rows = [sorted(row, key=lambda box: min(boxes.nodes[box]["members"])) for row in nx.topological_generations(boxes)]
    place = {box: ((i + 0.5) / len(row), -y) for y, row in enumerate(rows) for i, box in enumerate(row)}
    matplotlib.rcParams["svg.hashsalt"] = "curvspace"
    figure = Figure(figsize=(9, 0.9 * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(0.5 - len(rows), 0.5))
    axes.axis("off")
    arrows = sorted((place[tail], place[head]) for tail, head in nx.transitive_reduction(boxes).edges)
    for start, end in arrows:  # sorted: the parts come in sets
        arrow = {"arrowstyle": "-|>", "color": "#666666", "shrinkA": 12, "shrinkB": 12}
        axes.annotate("", end, start, arrowprops=arrow)
    for box, (x, y) in place.items():
        members = sorted(boxes.nodes[box]["members"])
        style = {"boxstyle": "round", "facecolor": COLOURS[members[0].split(".")[0]], "edgecolor": "#666666"}
        axes.text(x, y, "\n".join(members), ha="center", va="center", fontsize=8, bbox=style)
    figure.savefig(out, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m workflow.dependencies", description=__doc__)
    parser.add_argument("out", type=Path, help="the SVG file to write")
    draw(parts(), parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
