"""Figures, rendered from results: scores by task, scores against sizes, the curves of a training."""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import write_atomic
from .tables import Grid, main_score, metric_label, task_label


# Okabe and Ito's palette, distinguishable with colour-vision deficiency; black is kept for the teacher.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def save_figure(draw: Callable[[Any], None], size: tuple[float, float], path: str | Path) -> None:
    """Writes what `draw` puts into a matplotlib figure of so many inches as a PNG."""
    # Not pyplot: no global state, no display, and no backend changed for the caller.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


def _literal(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def plot_results(results: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes a PNG with one panel per task: the teacher and every variant, mean and standard deviation over the
    seeds, single seeds as small dots."""
    grid = Grid(results)

    def draw(figure: Any) -> None:
        columns = min(len(grid.tasks), 3)
        axes = figure.subplots(math.ceil(len(grid.tasks) / columns), columns, squeeze=False).flatten()
        for axis, task in zip(axes, grid.tasks, strict=False):
            points = [
                ("teacher" if len(grid.teachers(task)) == 1 else f"teacher {model}", scores, "black")
                for model, scores in grid.teachers(task).items()
            ]
            for index, variant in enumerate(grid.variants):
                cell = grid.cells.get((task, variant), [])
                scores = [main_score(run, "packed") for run in cell]
                points.append((variant, scores, _COLOURS[index % len(_COLOURS)]))
            for x, (_, scores, colour) in enumerate(points):
                if not scores:
                    continue
                spread = statistics.stdev(scores) if len(scores) > 1 else None
                axis.errorbar([x], [statistics.mean(scores)], yerr=spread, fmt="o", color=colour, capsize=4)
                if len(scores) > 1:
                    axis.plot([x + 0.2] * len(scores), scores, ".", color=colour, alpha=0.6, markersize=4)
            teacher_mean = statistics.mean(points[0][1])
            axis.axhline(teacher_mean, color="black", linewidth=0.8, linestyle=":")
            axis.set_xticks(range(len(points)), [_literal(name) for name, _, _ in points], rotation=40, ha="right")
            axis.set_xlim(-0.6, len(points) - 0.4)
            axis.margins(y=0.15)
            metric = metric_label(grid.column(task)[0]["main_metric"])
            axis.set_title(_literal(f"{task_label(task)}\n{metric} x 100"), fontsize=10)
            axis.grid(axis="y", alpha=0.3)
        for axis in axes[len(grid.tasks) :]:
            axis.remove()
        figure.supxlabel("bars: standard deviation over seeds; small dots: seeds; dotted: teacher", fontsize=8)

    columns = min(len(grid.tasks), 3)
    width = max(2.6, 1.1 + 0.45 * (len(grid.variants) + 1)) * columns
    save_figure(draw, (max(4.0, width), 3.8 * math.ceil(len(grid.tasks) / columns)), path)


def _distance(run: Mapping[str, Any]) -> float:
    if "teacher_distance" not in run["packed"]:
        raise ValueError(f"{run['run']}: its results lack the field 'packed.teacher_distance', run it again")
    return run["packed"]["teacher_distance"]


def _megabytes(run: Mapping[str, Any]) -> float:
    return run["packed"]["bytes"] / 1e6


def _million_multiply_adds(run: Mapping[str, Any]) -> float:
    if "multiply_adds" not in run:
        raise ValueError(f"{run['run']}: its results lack the field 'multiply_adds', run it again")
    return sum(run["multiply_adds"].values()) / 1e6


# Horizontal axis of `plot_sizes` -> (its label, a run's value)
SIZE_AXES = {
    "bytes": ("file, MB (10^6 bytes)", _megabytes),
    "multiply_adds": ("multiply-adds of a sentence of 128 tokens, millions", _million_multiply_adds),
}


# Family of a recipe -> marker
_MARKERS = {"ternary": "o", "binary": "s", "ghost": "^"}
_TEACHER_MARKER = "D"


def _tasks_of_sizes(grid: Grid, chosen: Sequence[str] | None) -> tuple[list[str | None], list[str], str]:
    """Tasks of a mean, variants that have them all, and a line on what is left out."""
    owned = {name: {task for task in grid.tasks if (task, name) in grid.cells} for name in grid.variants}
    if chosen:
        if missing := [task for task in chosen if task not in grid.tasks]:
            raise ValueError(f"tasks: expected some of {grid.tasks}, found {missing}")
        tasks = [task for task in grid.tasks if task in chosen]
        out = [name for name, has in owned.items() if not has.issuperset(tasks)]
        if len(out) == len(owned):
            raise ValueError(f"tasks: no variant has all of {tasks}; choose fewer")
        note = f"without those that lack one of these tasks: {', '.join(out)}" if out else ""
        return tasks, [name for name in owned if name not in out], note
    tasks = [task for task in grid.tasks if all(task in has for has in owned.values())]
    if not tasks:
        found = "; ".join(f"{name}: {', '.join(map(task_label, has))}" for name, has in owned.items())
        raise ValueError(f"no task is common to all variants, choose some with --tasks ({found})")
    out = [task_label(task) for task in grid.tasks if task not in tasks]
    return tasks, list(owned), f"tasks common to all variants; not {', '.join(out)}" if out else ""


def plot_sizes(
    results: Sequence[Mapping[str, Any]],
    path: str | Path,
    axis_name: str = "bytes",
    tasks: Sequence[str] | None = None,
    distances: bool = False,
) -> None:
    """Writes a PNG of score against size: per variant the main metric x 100, mean over the tasks, and the MB of the
    packed file or, with `axis_name` "multiply_adds", the encoder's work.

    All means are of the same tasks: those that every variant has, or `tasks`, without the variants that lack one of
    them. The figure says which. Markers tell families apart. Variants named alike but for a number at the end
    ("ghost-0.25", "gain-3.4mb") are joined by a line. The teacher's work is not in the results: its score is a dotted
    line. With `distances` the mean squared difference from the teacher's logits stands in the place of the score.

    Raises:
        ValueError: no task is common to all variants, or none has all of `tasks`.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    grid = Grid(results)
    label, size_of = SIZE_AXES[axis_name]
    tasks, variants, note = _tasks_of_sizes(grid, tasks)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        points = []  # (name, size, score, colour, marker)
        teachers = set() if distances else {model for task in tasks for model in grid.teachers(task)}
        measure = _distance if distances else lambda run: main_score(run, "packed")
        for model in sorted(teachers):
            if not all(model in grid.teachers(task) for task in tasks):
                continue
            score = statistics.mean(statistics.mean(grid.teachers(task)[model]) for task in tasks)
            if axis_name == "bytes":
                runs = [run for task in tasks for run in grid.column(task) if run["teacher"]["model"] == model]
                size = statistics.mean(run["teacher"]["bytes"] / 1e6 for run in runs)
                name = "teacher" if len(teachers) == 1 else f"teacher {model}"
                points.append((name, size, score, "black", _TEACHER_MARKER))
            else:
                axis.axhline(score, color="black", linewidth=0.8, linestyle=":")
        series: dict[str, list[tuple[float, float]]] = {}
        families = set()
        for variant in variants:
            cells = [grid.cells[task, variant] for task in tasks]
            score = statistics.mean(statistics.mean(map(measure, cell)) for cell in cells)
            size = statistics.mean(size_of(run) for cell in cells for run in cell)
            name = re.sub(r"-[\d.]+(mb)?$", "", variant)
            series.setdefault(name, []).append((size, score))
            family = cells[0][0]["recipe"].get("family", "ternary")
            families.add(family)
            colour = _COLOURS[list(series).index(name) % len(_COLOURS)]
            points.append((variant, size, score, colour, _MARKERS.get(family, "*")))
        for _, size, score, colour, marker in points:
            axis.plot([size], [score], marker, color=colour)
        for index, line in enumerate(series.values()):
            if len(line) > 1:
                axis.plot(*zip(*sorted(line)), "-", color=_COLOURS[index % len(_COLOURS)], linewidth=1.0)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.25, y=0.15)
        _label_points(axis, points, figure.get_size_inches())
        axis.set_xlabel(label)
        names = ", ".join(map(task_label, tasks))
        axis.set_ylabel(f"{names}: squared distance to the teacher" if distances else f"mean of {names}, x 100")
        axis.grid(alpha=0.3)
        if len(families) > 1:
            for family in sorted(families):
                axis.plot([], [], _MARKERS.get(family, "*"), color="grey", label=family)
            axis.legend(fontsize=8, loc="upper left")
        if note:
            figure.supxlabel(_literal("\n".join(textwrap.wrap(note, 110))), fontsize=8)

    save_figure(draw, (8.0, max(4.5, 2.0 + 0.2 * len(variants))), path)


def _label_points(axis: Any, points: Sequence[tuple[str, float, float, str, str]], inches: Sequence[float]) -> None:
    """Names beside points, moved up or down where they would stand on each other, then with a line to their point."""
    left, right = (math.log(limit) for limit in axis.get_xlim())
    bottom, top = axis.get_ylim()
    height, letter = 12 / 72 / (0.8 * inches[1]), 4.6 / 72 / (0.85 * inches[0])  # in 8 points, as shares of the axes
    gap = 0.015  # from a point to its name
    room = ((math.log(x) - left) / max(1 - gap - letter * len(name), 0.2) for name, x, *_ in points)
    right = max(right, left + max(room, default=0.0))  # names end inside the axes
    taken: list[tuple[float, float, float]] = []  # where names begin, end and stand
    for name, x, y, colour, _ in sorted(points, key=lambda point: point[2]):
        begin, at = (math.log(x) - left) / (right - left) + gap, (y - bottom) / (top - bottom) - height / 3
        end = begin + letter * len(name)
        around = [low for low_begin, low_end, low in taken if begin < low_end and low_begin < end]
        spots = (low + sign * height for low in around for sign in (1, -1))
        free = [at, *(spot for spot in spots if 0 <= spot <= 1 - height)]
        low = min(
            (low for low in free if all(abs(low - other) > 0.999 * height for other in around)),
            key=lambda low: abs(low - at),
            default=at,  # more names than fit above each other
        )
        taken.append((begin, end, low))
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.4), "shrinkA": 0}
        axis.annotate(
            _literal(name),
            (x, y),
            (begin, low),
            textcoords="axes fraction",
            fontsize=8,
            arrowprops=arrow if low != at else None,
        )
    axis.set_xlim(math.exp(left), math.exp(right))
    axis.set_ylim(bottom, top)


# What the Trainer logs beside scores at each evaluation.
_NOT_A_SCORE = ("loss", "runtime", "_per_second", "_time")


def _curves(log_history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict], dict[str, dict]]:
    losses: dict[str, dict[int, float]] = {}
    scores: dict[str, dict[int, float]] = {}
    for entry in log_history:
        if "step" not in entry or "train_runtime" in entry:
            continue
        for key, value in entry.items():
            if not isinstance(value, int | float):
                continue
            if key.startswith("eval_"):
                if not key.endswith(_NOT_A_SCORE):
                    scores.setdefault(metric_label(key.removeprefix("eval_")), {})[entry["step"]] = 100 * value
            elif "loss" in key:
                losses.setdefault(metric_label(key), {})[entry["step"]] = value
    return losses, scores


def plot_training(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Writes a PNG: every logged loss term (upper panel) and every evaluation score x 100 (lower) against the step.

    Args:
        log_history: `trainer.state.log_history`: terms are its training entries with "loss" in their name, scores its
            `eval_*` entries.

    Raises:
        ValueError: the history holds neither.
    """
    losses, scores = _curves(log_history)
    curves = [(name, lines) for name, lines in (("loss", losses), ("score x 100", scores)) if lines]
    if not curves:
        raise ValueError("the log history holds no training loss and no evaluation score")

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False).flat
        for axis, (name, lines) in zip(axes, curves, strict=True):
            for index, (label, points) in enumerate(lines.items()):
                steps = sorted(points)
                # A lone evaluation is a point: a line through it would be invisible.
                axis.plot(
                    steps,
                    [points[step] for step in steps],
                    marker="o" if name != "loss" or len(steps) == 1 else None,
                    markersize=4,
                    linewidth=2.0 if label == "loss" else 1.3,
                    color="black" if label == "loss" else _COLOURS[index % len(_COLOURS)],
                    label=_literal(label),
                )
            if name == "loss" and all(value > 0 for points in lines.values() for value in points.values()):
                axis.set_yscale("log")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        axis.set_xlabel("step")

    save_figure(draw, (8.0, 3.0 * len(curves)), path)
