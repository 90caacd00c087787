"""Two figures which share a helper."""

WIDTH = 2.0


def _line(axes, table):
    axes.plot(table["step"], table["train_loss"])


def losses(tables, style):
    figure, axes = style.panels()
    _line(axes[0, 0], tables["runs"])
    return figure, tables["runs"]


def spectrum(tables, style):
    figure, axes = style.panels()
    _line(axes[0, 0], tables["measure"])
    axes[0, 0].axvline(WIDTH)
    return figure, tables["measure"]
