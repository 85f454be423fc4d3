"""Plots of results. The only file of bench that needs matplotlib."""

from collections.abc import Mapping

from matplotlib.figure import Figure


def scaling(axes: Mapping[str, list[dict]], path: str) -> None:
    """A panel for each axis: time a step over size, and dashed what it would be if it went as the operations.

    The dashed line meets the time at the largest size, where the cost of calls weighs least.
    """
    figure = Figure(figsize=(4 * len(axes), 3.5), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for panel, (axis, points) in zip(panels, axes.items(), strict=True):
        values, last = [point["value"] for point in points], points[-1]
        panel.loglog(values, [point["ms"] for point in points], "o-", label="measured")
        scaled = [last["ms"] * point["flops"] / last["flops"] for point in points]
        panel.loglog(values, scaled, "--", label="as counted operations")
        panel.set_xticks(values, [str(value) for value in values])
        panel.xaxis.minorticks_off()
        panel.set_xlabel(axis)
        panel.set_ylabel("ms a step")
    panels[0].legend()
    figure.savefig(path)


def crossover(points: list[dict], backend: str, path: str) -> None:
    """Time a step over its operations on numpy and on `backend`."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    panel = figure.subplots()
    gflop = [1e-9 * point["flops"] for point in points]
    panel.loglog(gflop, [point["cpu"] for point in points], "o-", label="numpy")
    panel.loglog(gflop, [point["gpu"] for point in points], "s-", label=backend)
    panel.set_xlabel("Gflop a step")
    panel.set_ylabel("ms a step")
    panel.legend()
    figure.savefig(path)
