"""A detection matrix to look at: faults down, checks across; readable in grey."""

from pathlib import Path

from pdkit.faults.matrix.report import CAUGHT, MISSED, NOT_RUN, symbol
from pdkit.faults.matrix.results import Results

CELL = 0.22
SHADES = {CAUGHT: "#1f4e79", MISSED: "#ffffff", NOT_RUN: "#e4e4e4"}


def draw(results: Results, path: Path) -> None:
    """Dark: caught, with the seconds that the test took; white: missed; grey: not run. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a third of the size, and searchable
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    runs, checks = results.faulty, results.checks
    figure, axes = pyplot.subplots(
        figsize=(5 + 0.62 * (len(checks) + 1), 2.4 + CELL * (len(runs) + 2)), layout="constrained"
    )
    shades = list(SHADES)
    cells = [[shades.index(symbol(run, check)) for check in checks] for run in runs]
    colors = ListedColormap(list(SHADES.values()))
    extent = (0, len(checks), len(runs) + 1, 1)
    axes.imshow(cells, cmap=colors, vmin=0, vmax=len(shades) - 1, extent=extent, aspect="auto", interpolation="none")
    axes.hlines(range(1, len(runs) + 2), 0, len(checks), colors="#9a9a9a", linewidth=0.5)
    axes.vlines(range(len(checks) + 1), 1, len(runs) + 1, colors="#9a9a9a", linewidth=0.5)
    for row, run in enumerate(runs, start=1):
        for column, check in enumerate(checks):
            what = symbol(run, check)
            text = f"{run.verdicts[check].seconds:.1f}" if what == CAUGHT else what
            color = "#ffffff" if what == CAUGHT else "#555555"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=6.5, color=color)
        first = f"{run.first_caught:.1f} s" if run.first_caught is not None else _why(results, run)
        axes.text(len(checks) + 0.1, row + 0.5, first, ha="left", va="center", fontsize=7)
    for column, check in enumerate(checks):
        failed = sum(run.verdicts[check].caught for run in results.clean if check in run.verdicts)
        axes.text(column + 0.5, 0.5, f"{failed}/{len(results.clean)}", ha="center", va="center", fontsize=6.5)
    axes.text(len(checks) + 0.1, -0.15, "first\ncaught after", ha="left", va="bottom", fontsize=7)
    axes.set_xlim(0, len(checks) + 1.4)
    axes.set_ylim(len(runs) + 1, 0)
    axes.set_yticks(
        [row + 0.5 for row in range(len(runs) + 1)], ["no fault: failed runs", *(run.fault for run in runs)], fontsize=7
    )
    axes.set_xticks([column + 0.5 for column in range(len(checks))], checks, rotation=45, ha="left", fontsize=7.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.suptitle(
        "dark: caught, seconds of the test    white –: missed    grey ·: not run, servers were gone", fontsize=8
    )
    figure.savefig(path)
    pyplot.close(figure)


def _why(results, run):
    truth = results.truths.get(run.fault)
    return "changes nothing" if truth and not truth.changes else "never"
