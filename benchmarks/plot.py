"""One plot for all benchmarks: a line per model over length, the roofline dashed."""

from pathlib import Path


def lines(file: Path, rows: list[dict], x: str, y: str, x_label: str, y_label: str, limit: str | None = None) -> None:
    """Draws `y` over `x` for every model (and way), and `limit` in the same colour, dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    named = [(f"{row['model']} {row.get('way', '')}".strip(), row) for row in rows if row.get(y) is not None]
    for name in dict.fromkeys(name for name, _ in named):
        points = [row for label, row in named if label == name]
        (line,) = axes.plot([row[x] for row in points], [row[y] for row in points], marker="o", label=name)
        if limit is not None and all(row.get(limit) for row in points):
            bounds = [row[limit] for row in points]
            axes.plot([row[x] for row in points], bounds, linestyle="--", linewidth=1, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    if limit is not None:
        axes.plot([], [], linestyle="--", color="grey", label=limit)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)
