"""The picture of the benchmark."""

from pathlib import Path

import pandas as pd

from svi_step_parts.contestants import COMPILED, EPOCH, FLOOR, NAMES, STOCK

__all__ = ["draw"]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Writes a panel for each program, with a bar for each contestant.

    Args:
        table: Columns ``title``, ``contestant``, and ``ratio``, how many times as fast as
            ``pyro.infer.SVI``.
        path: Where to.
    """
    from matplotlib import pyplot as plt

    ratios = {
        title: dict(zip(group["contestant"], group["ratio"], strict=True))
        for title, group in table.groupby("title", sort=False)
    }
    num_columns = min(4, len(ratios))
    num_rows = -(-len(ratios) // num_columns)
    bars = [name for name in NAMES if name not in (STOCK, FLOOR)]
    colors = {COMPILED: "C0", EPOCH: "C0"}
    size = (1.6 + 1.9 * num_columns, 0.6 + 2.0 * num_rows)
    figure, panels = plt.subplots(
        num_rows, num_columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, (title, of_stock) in zip(panels.flat, ratios.items(), strict=False):
        longest = max(of_stock.get(name, 0.0) for name in bars)
        for place, name in enumerate(bars):
            if name in of_stock:
                ax.barh(place, of_stock[name], color=colors.get(name, "0.7"))
            text = f" {of_stock[name]:.1f}" if name in of_stock else " –"
            ax.text(of_stock.get(name, 0.0), place, text, va="center", fontsize=8)
        ax.axvline(1.0, color="black", linewidth=0.8)
        if of_stock[FLOOR] < 1.6 * longest:
            ax.axvline(of_stock[FLOOR], color="C3", linestyle="--", linewidth=1)
            longest = max(longest, of_stock[FLOOR])
        first, _, second = title.partition(", ")
        ax.set_title(f"{first}\n{second}", fontsize=9)
        ax.set(xlim=(0, 1.25 * longest), yticks=range(len(bars)), yticklabels=bars)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in list(panels.flat)[len(ratios) :]:
        ax.set_axis_off()
    panels[0, 0].invert_yaxis()
    text = f"times as fast as {STOCK} (black); red: the matrix products alone, where in range"
    figure.supxlabel(text, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
