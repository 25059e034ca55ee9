"""Lay the loss curves of runs over one another: a PNG, and the largest difference.

python examples/losses.py run/losses.csv alone/losses.csv --out losses.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="files that examples/train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("losses.png"))
    asked = parser.parse_args()
    curves = {str(path): np.loadtxt(path, delimiter=",", ndmin=2) for path in asked.runs}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        style = "--" if number else "-"  # the first one shows between the dashes of the others
        axes.plot(curve[:, 0], curve[:, 1], style, linewidth=2.5 - number, label=name)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(asked.out, dpi=120)
    first, *others = curves.values()
    for name, other in zip(list(curves)[1:], others, strict=True):
        same = min(len(first), len(other))
        difference = np.abs(first[:same, 1] / other[:same, 1] - 1).max()
        print(f"{asked.out}: {same} steps, losses differ from {name} by {difference:.1e} at most")


if __name__ == "__main__":
    main()
