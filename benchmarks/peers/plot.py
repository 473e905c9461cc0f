"""A picture of the ratios beside their aims."""
import math

from .tables import met

COARSE, FINE = (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # of each decade


def bars_of(cases):
    """[(label, ratio)] of all ratios that have an aim, case by case."""
    return [(f"{case}: {row['what']}, {name}", ratio) for case, rows in cases.items() for row in rows
            for name, ratio in row["ratios"].items() if ratio and "aim" in ratio]


def ticks_of(low, high):
    """Round numbers from `low` to `high`, far enough apart that their labels are: coarse ones over more than a decade and a half."""
    steps = COARSE if high > 30 * low else FINE
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def draw(cases, path, title):
    """Raises ImportError where there is no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    bars = bars_of(cases)[::-1]
    colours = {True: "tab:green", False: "tab:red", None: "tab:grey"}
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * len(bars)))
    for y, (_, ratio) in enumerate(bars):
        axes.barh(y, ratio["median"], color=colours[met(ratio)], height=0.7)
        axes.plot([ratio["low"], ratio["high"]], [y, y], color="black", linewidth=1)
        axes.plot([ratio["aim"]] * 2, [y - 0.45, y + 0.45], color="tab:blue", linewidth=2)
        if ratio.get("more"):
            axes.annotate("or more", (ratio["median"], y), va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.axvline(1.0, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="ratio; blue: aim (at most, for ranks); black: spread of the turns", title=title,
             ylim=(-0.7, len(bars) - 0.3))
    ticks = ticks_of(*axes.get_xlim())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")  # labels are as long as they are
