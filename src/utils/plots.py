"""Figures, one claim each: `plot_x(ax, arrays) -> ax`.

A function draws on the axes that it is given; it never opens, shows or saves a
figure. A, B and tie have one fixed colour everywhere.
"""

import matplotlib.pyplot as plt
import seaborn as sns

# Okabe-Ito colours, told apart by colour-blind readers, in LABELS order.
LABEL_COLORS = ("#0072B2", "#D55E00", "#7F7F7F")
ACCENT, MUTED = "#009E73", "#BBBBBB"


def use_style() -> None:
    """Set the suite's look once, in a notebook's import cell."""
    sns.set_theme(style="whitegrid", context="notebook", rc={"axes.titleweight": "bold", "axes.titlesize": 12})
    plt.rcParams["figure.dpi"] = 100
