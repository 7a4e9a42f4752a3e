"""Plots: a line per model over length, its roofline dashed; a grid of such plots; or bars side by side."""

from pathlib import Path


def line_plot(
    file: Path, rows: list[dict], x: str, y: str, x_label: str, y_label: str, dashed: str | None = None
) -> None:
    """Draws column `y` over column `x` for every model (and way of running it), and `dashed` in the same colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    labelled = [(f"{row['model']} {row.get('way', '')}".strip(), row) for row in rows if row.get(y) is not None]
    for name in dict.fromkeys(label for label, _ in labelled):
        points = [row for label, row in labelled if label == name]
        (line,) = axes.plot([row[x] for row in points], [row[y] for row in points], marker="o", label=name)
        if dashed is not None and all(row.get(dashed) for row in points):
            values = [row[dashed] for row in points]
            axes.plot([row[x] for row in points], values, linestyle="--", linewidth=1, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    if dashed is not None:
        axes.plot([], [], linestyle="--", color="grey", label=dashed)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def grid_plot(file: Path, rows: list[dict], column: str, x: str, measures: list[str]) -> None:
    """Draws a grid of plots over `x`: a row per measure, a column per value of `column`, a line per model."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(row[column] for row in rows))
    figure = Figure(figsize=(1 + 3.5 * len(columns), 0.5 + 2.3 * len(measures)), layout="constrained")
    grid = figure.subplots(len(measures), len(columns), squeeze=False, sharex=True, sharey="row")
    ticks = sorted({row[x] for row in rows})
    for measure, all_axes in zip(measures, grid, strict=True):
        for value, axes in zip(columns, all_axes, strict=True):
            for name in dict.fromkeys(row["model"] for row in rows):
                points = sorted(
                    (row[x], row[measure]) for row in rows if row[column] == value and row["model"] == name
                )
                axes.plot([point[0] for point in points], [point[1] for point in points], marker="o", label=name)
            axes.set(xscale="log", yscale="log", title=f"{column} {value:,}" if measure == measures[0] else None)
            axes.set_xticks(ticks, ticks, minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(which="both", alpha=0.25)
        all_axes[0].set_ylabel(measure)
    for axes in grid[-1]:
        axes.set_xlabel(x)
    grid[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def bar_plot(file: Path, panels: dict[str, dict[str, tuple[float, float, float]]], y_label: str) -> None:
    """Draws panels of bars side by side: each bar is (value, least, most), its error bar from least to most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.5 * sum(map(len, panels.values())), 4.5), layout="constrained")
    widths = {"width_ratios": [len(bars) for bars in panels.values()]}
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, gridspec_kw=widths)[0]
    for axes, (title, bars) in zip(all_axes, panels.items(), strict=True):
        values = [value for value, _, _ in bars.values()]
        errors = [
            [value - least for value, least, _ in bars.values()],
            [most - value for value, _, most in bars.values()],
        ]
        axes.bar(range(len(bars)), values, yerr=errors, capsize=4)
        axes.set_xticks(range(len(bars)), list(bars), rotation=60, ha="right", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].set_ylabel(y_label)
    figure.savefig(file, dpi=120)
