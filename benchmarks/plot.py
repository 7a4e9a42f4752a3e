"""Plots: a line per model over length, the roofline dashed; or bars side by side."""

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


def bars(file: Path, groups: dict[str, dict[str, tuple[float, float, float]]], label: str) -> None:
    """Draws a panel per group: for each name a bar with its value, and a line from least to most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.5 * sum(map(len, groups.values())), 4.5), layout="constrained")
    widths = {"width_ratios": [len(ones) for ones in groups.values()]}
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True, gridspec_kw=widths)[0]
    for axes, (group, ones) in zip(panels, groups.items(), strict=True):
        values, errors = [], ([], [])
        for value, least, most in ones.values():
            values.append(value)
            errors[0].append(value - least)
            errors[1].append(most - value)
        axes.bar(range(len(ones)), values, yerr=errors, capsize=4)
        axes.set_xticks(range(len(ones)), list(ones), rotation=60, ha="right", fontsize=8)
        axes.set_title(group, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel(label)
    figure.savefig(file, dpi=120)
