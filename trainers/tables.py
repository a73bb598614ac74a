"""Tables and figures, rendered from results.

Scores are shown times 100. Nothing here is typed by hand except the published numbers in `PUBLISHED`, each with its
source.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import load_results, write_atomic


# GLUE's column order in the TernaryBERT paper; a task that is not here comes last under its own name.
TASK_LABELS = {
    "mnli": "MNLI",
    "qqp": "QQP",
    "qnli": "QNLI",
    "sst2": "SST-2",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "rte": "RTE",
    "wnli": "WNLI",
    "squad": "SQuAD v1.1",
    "squad_v2": "SQuAD v2.0",
}

# GLUE's columns by (task, metric). TernaryBERT, BinaryBERT and BiBERT average all nine; BiT takes MNLI once, matched.
GLUE_COLUMNS = (
    ("mnli", "accuracy"),
    ("mnli", "accuracy_mismatched"),
    ("qqp", "accuracy"),
    ("qnli", "accuracy"),
    ("sst2", "accuracy"),
    ("cola", "matthews_correlation"),
    ("stsb", "pearson_spearman"),
    ("mrpc", "accuracy"),
    ("rte", "accuracy"),
)

PUBLISHED_SOURCE = "TernaryBERT (Zhang et al., EMNLP 2020) or BinaryBERT (Bai et al., ACL 2021), BERT-base"
_FULL = {
    **{"mnli": 84.5, "qqp": 90.9, "qnli": 92.0, "squad": 88.7, "squad_v2": 77.7},
    **{"sst2": 93.1, "cola": 58.1, "mrpc": 86.5, "stsb": (89.8 + 89.4) / 2, "rte": 71.1},
}
_BINARY = {
    **{"mnli": 84.9, "qqp": 91.4, "qnli": 92.1, "squad": 89.7, "squad_v2": 77.5},
    **{"sst2": 93.2, "cola": 59.7, "mrpc": 86.3, "stsb": 90.1, "rte": 72.2},
}
# (bits, weight quantizer, planes) -> (scores of the full-precision model, of the low-bit one). MNLI: matched. MRPC and
# QQP: accuracy. SQuAD: F1. STS-B: mean of Pearson and Spearman in TernaryBERT, one correlation in BinaryBERT. CoLA:
# Matthews correlation.
PUBLISHED = {
    # TernaryBERT (EMNLP 2020), dev results, rows BERT 32-32-32, TernaryBERT-TWN 2-2-8 and TernaryBERT-LAT 2-2-8
    ("2-2-8", "twn", 1): (
        _FULL,
        {
            **{"mnli": 83.3, "qqp": 90.1, "qnli": 91.1, "squad": 87.4, "squad_v2": 76.4},
            **{"sst2": 92.8, "cola": 55.7, "mrpc": 87.5, "stsb": (87.9 + 87.7) / 2, "rte": 72.9},
        },
    ),
    ("2-2-8", "lat", 1): (
        _FULL,
        {
            **{"mnli": 83.5, "qqp": 90.1, "qnli": 91.5, "squad": 87.5, "squad_v2": 76.6},
            **{"sst2": 92.5, "cola": 54.3, "mrpc": 87.0, "stsb": (87.9 + 87.6) / 2, "rte": 72.2},
        },
    ),
    # BinaryBERT (ACL 2021), dev results without data augmentation, full-precision teacher, rows BWN (1 plane), TWS (2)
    ("1-1-8", "bwn", 1): (
        _BINARY,
        {
            **{"mnli": 84.2, "qqp": 91.1, "qnli": 90.7, "squad": 86.9, "squad_v2": 76.6},
            **{"sst2": 92.3, "cola": 46.7, "mrpc": 82.6, "stsb": 86.8, "rte": 68.6},
        },
    ),
    ("1-1-8", "bwn", 2): (
        _BINARY,
        {
            **{"mnli": 84.2, "qqp": 91.2, "qnli": 91.5, "squad": 88.3, "squad_v2": 77.2},
            **{"sst2": 92.6, "cola": 53.4, "mrpc": 85.5, "stsb": 88.6, "rte": 72.2},
        },
    ),
    ("1-1-4", "bwn", 1): (
        _BINARY,
        {
            **{"mnli": 83.5, "qqp": 90.9, "qnli": 90.7, "squad": 85.8, "squad_v2": 75.1},
            **{"sst2": 92.3, "cola": 34.8, "mrpc": 79.9, "stsb": 84.9, "rte": 65.3},
        },
    ),
    ("1-1-4", "bwn", 2): (
        _BINARY,
        {
            **{"mnli": 83.9, "qqp": 91.2, "qnli": 90.9, "squad": 87.2, "squad_v2": 75.4},
            **{"sst2": 92.3, "cola": 44.4, "mrpc": 83.3, "stsb": 87.2, "rte": 65.3},
        },
    ),
}


def escape_markdown(text: object) -> str:
    """One line of Markdown that shows `text` literally, also inside a table cell: no markup, no HTML, no template."""
    line = " ".join("".join(" " if not char.isprintable() else char for char in str(text)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]|~#!$])", r"\\\1", line).replace("{", "&#123;").replace("}", "&#125;")
    # An underscore inside a word is no markup, and names such as per_row stay readable in the raw file.
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\_", line)
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", line)  # at the start: a list, a rule or a heading


def task_label(task: str | None) -> str:
    """Column title of a task; None is data of the user's own."""
    return TASK_LABELS.get(task, task) if task else "own data"


def metric_label(metric: str) -> str:
    return metric.replace("_", " ")


def variant_of(results: Mapping[str, Any]) -> str:
    """The run's name without its task and seed: 'sst2/twn/seed42' is the variant 'twn'."""
    drop = {results["task"], f"seed{results['seed']}"}
    return "/".join(part for part in results["run"].split("/") if part not in drop) or results["run"]


def main_score(results: Mapping[str, Any], part: str) -> float:
    """Main metric x 100 of `part`: "teacher", "student" (fake-quant) or "packed"."""
    return 100 * results[part]["metrics"][results["main_metric"]]


def published_drop(results: Mapping[str, Any]) -> float | None:
    """Points that the paper reports losing on this task with these bits, weight quantizer and planes, or None.

    A ternary network of half width, an adaptively split one and the like have no published counterpart.
    """
    stages = results["recipe"].get("stages") or [{}]
    quantization, inits = stages[-1].get("quantization") or {}, {stage.get("init") for stage in stages}
    bits, planes = quantization.get("bits", ""), quantization.get("planes", 1)
    quantizer = "bwn" if bits.startswith("1-") else quantization.get("weight_quantizer")
    full, low = PUBLISHED.get((bits, quantizer, planes), ({}, {}))
    other = any(stage.get("split_megabytes") for stage in stages) or ("pruned" in inits) != (planes == 2)
    if results["task"] not in low or other:
        return None
    return round(full[results["task"]] - low[results["task"]], 2)


class _Grid:
    """Runs by task (columns) and variant (rows), each cell's runs in the order of their seeds."""

    def __init__(self, results: Sequence[Mapping[str, Any]]):
        if not results:
            raise ValueError("no results to show")
        order = list(TASK_LABELS)
        self.tasks = sorted(
            dict.fromkeys(run["task"] for run in results),
            key=lambda task: (order.index(task) if task in order else len(order), str(task)),
        )
        self.variants = list(dict.fromkeys(map(variant_of, results)))
        self.cells: dict[tuple[str | None, str], list[Mapping[str, Any]]] = {}
        for run in sorted(results, key=lambda run: run["seed"]):
            cell = self.cells.setdefault((run["task"], variant_of(run)), [])
            if cell and cell[-1]["seed"] == run["seed"]:
                raise ValueError(f"two different runs are called {run['run']!r} with seed {run['seed']}")
            cell.append(run)
        for task in self.tasks:
            self._check_column(task)

    def _check_column(self, task: str | None) -> None:
        """Scores under one title must come from one metric on the same rows."""
        runs = self.column(task)
        for field, value in (
            ("main_metric", lambda run: run["main_metric"]),
            ("split", lambda run: run["split"]),
            ("data of the evaluated split", lambda run: run["data"][run["split"]]),
            ("rows", lambda run: run["rows"]),
        ):
            for run in runs[1:]:
                if value(run) != value(runs[0]):
                    raise ValueError(
                        f"{task_label(task)}: {field} differs: {value(runs[0])!r} in {runs[0]['run']!r}, "
                        f"{value(run)!r} in {run['run']!r}; show them in separate tables"
                    )

    def column(self, task: str | None) -> list[Mapping[str, Any]]:
        return [run for (name, _), cell in self.cells.items() if name == task for run in cell]

    def teachers(self, task: str | None) -> dict[str, list[float]]:
        """Teacher name to the scores of its different seeds. Many runs share one teacher: it counts once."""
        distinct = {
            (run["teacher"]["model"], run["teacher"]["seed"], main_score(run, "teacher")) for run in self.column(task)
        }
        scores: dict[str, list[float]] = {}
        for model, _, score in sorted(distinct):
            scores.setdefault(model, []).append(score)
        return scores


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} (seeds {len(values)})"


def _drop_cell(cell: Sequence[Mapping[str, Any]]) -> str:
    drops = [main_score(run, "teacher") - main_score(run, "packed") for run in cell]
    text = _cell(drops)
    published = {published_drop(run) for run in cell}
    if len(published) != 1 or None in published:
        return text
    paper = published.pop()
    excess = round(statistics.mean(drops) - paper, 2)
    return f"{text}, paper {paper:.2f}" + (f", **{excess:.2f} over**" if excess > 0 else "")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table: tasks as columns; the teacher, then per run variant a row of scores and a row of drops.

    Each cell is mean ± sample standard deviation of the packed model's main metric x 100 over the seeds, with their
    number. A drop is teacher minus packed model, seed by seed against the run's own teacher; beside it stands the drop
    that the paper reports for BERT-base, and by how much ours is above it.

    Args:
        results: contents of `results.json` files, for example from `load_results`.

    Raises:
        ValueError: runs of one task that differ in metric, split or rows, or two runs of one name and seed.
    """
    grid = _Grid(results)
    titles = []
    for task in grid.tasks:
        titles.append(f"{task_label(task)} ({metric_label(grid.column(task)[0]['main_metric'])})")
    lines = [_row(["", *map(escape_markdown, titles)]), _row(["---"] * (len(titles) + 1))]
    teachers = {task: grid.teachers(task) for task in grid.tasks}
    if all(len(scores) == 1 for scores in teachers.values()):
        cells = (_cell(next(iter(teachers[task].values()))) for task in grid.tasks)
        lines.append(_row(["teacher", *cells]))
    else:
        for model in dict.fromkeys(model for scores in teachers.values() for model in scores):
            cells = (_cell(teachers[task][model]) if model in teachers[task] else "–" for task in grid.tasks)
            lines.append(_row([f"teacher {escape_markdown(model)}", *cells]))
    for variant in grid.variants:
        cells = [grid.cells.get((task, variant), []) for task in grid.tasks]
        title = escape_markdown(variant)
        lines.append(
            _row([title, *(_cell([main_score(run, "packed") for run in cell]) if cell else "–" for cell in cells)])
        )
        lines.append(_row([f"{title}: drop", *(_drop_cell(cell) if cell else "–" for cell in cells)]))
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(grid))]) + "\n"


def glue_averages(scores: Mapping[tuple[str, str], float]) -> tuple[float, float]:
    """Mean over GLUE's nine columns (MNLI matched and mismatched are two), and over eight (MNLI matched alone): never
    compare one with the other.

    Args:
        scores: by (task, metric), at least those of `GLUE_COLUMNS`.

    Raises:
        ValueError: a column is missing.
    """
    missing = [column for column in GLUE_COLUMNS if column not in scores]
    if missing:
        raise ValueError(f"averages over GLUE: missing {missing}")
    nine = [scores[column] for column in GLUE_COLUMNS]
    return statistics.mean(nine), statistics.mean([nine[0], *nine[2:]])


def render_metrics(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of the packed models' metrics of tasks that have more than one, mean x 100 over the seeds, and
    GLUE's averages where a variant has all its columns; empty if there is neither."""
    grid = _Grid(results)
    shown = {}
    for task in grid.tasks:
        metrics = list(dict.fromkeys(name for run in grid.column(task) for name in run["packed"]["metrics"]))
        if len(metrics) > 1:
            shown[task] = metrics
    rows, averaged = [], False
    for variant in grid.variants:
        means = {
            (task, name): 100 * statistics.mean(run["packed"]["metrics"][name] for run in cell)
            for (task, of), cell in grid.cells.items()
            if of == variant
            for name in cell[0]["packed"]["metrics"]
        }
        cells = []
        for task, metrics in shown.items():
            cells.append(" / ".join(f"{means[task, name]:.2f}" if (task, name) in means else "–" for name in metrics))
        if all(column in means for column in GLUE_COLUMNS):
            averaged = True
            cells.append(" / ".join(f"{value:.2f}" for value in glue_averages(means)))
        else:
            cells.append("–")
        rows.append([escape_markdown(variant), *cells])
    if not shown:
        return ""
    titles = [f"{task_label(task)} ({' / '.join(map(metric_label, names))})" for task, names in shown.items()]
    header = ["", *map(escape_markdown, titles), "GLUE, 9 / 8 columns"]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(_row(line if averaged else line[:-1]) for line in lines) + "\n"


_BLOCK = re.compile(r"(<!-- qbert table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def update_tables(text: str, root: str | Path) -> str:
    """`text` with every block `<!-- qbert table FOLDER -->` ... `<!-- end -->` rendered again from the results in that
    folder, relative to `root`.

    Raises:
        ValueError: the text has no such block, or a folder no results.
    """
    if not _BLOCK.search(text):
        raise ValueError("expected blocks '<!-- qbert table FOLDER -->' ... '<!-- end -->', found none")
    return _BLOCK.sub(lambda match: match[1] + render_table(load_results([Path(root) / match[2]])) + match[3], text)


def _notes(grid: _Grid) -> list[str]:
    runs = [run for cell in grid.cells.values() for run in cell]
    rows = []
    for task in grid.tasks:
        run = grid.column(task)[0]
        rows.append(escape_markdown(f"{task_label(task)} {run['split']} ({run['rows']} rows)"))
    asked = ["squad" in str(task) for task in grid.tasks]
    benchmark = "SQuAD" if all(asked) else "GLUE and SQuAD" if any(asked) else "GLUE"
    seeds = sorted({run["seed"] for run in runs})
    commits = sorted({run["commit"] or "unknown" for run in runs})
    devices = sorted({run["device"] for run in runs})
    return [
        "Main metric x 100 of the packed model, mean ± sample standard deviation over the seeds. Drop: teacher minus "
        "packed model, each run against its own teacher; negative is a gain.",
        f"Paper: drop of {PUBLISHED_SOURCE}, {benchmark} dev, at the same bits with the same weight quantizer; "
        "**over** marks a mean drop above it.",
        f"Evaluated on: {', '.join(rows)}. Runs: {len(runs)}. Seeds: {', '.join(map(str, seeds))}. "
        f"Commits: {escape_markdown(', '.join(commit[:7] + commit[40:] for commit in commits))}. "
        f"Devices: {escape_markdown('; '.join(devices))}.",
    ]


# Okabe and Ito's palette, distinguishable with colour-vision deficiency; black is kept for the teacher.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def _save_figure(draw: Callable[[Any], None], size: tuple[float, float], path: str | Path) -> None:
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
    grid = _Grid(results)

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
    _save_figure(draw, (max(4.0, width), 3.8 * math.ceil(len(grid.tasks) / columns)), path)


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


def plot_sizes(results: Sequence[Mapping[str, Any]], path: str | Path, axis_name: str = "bytes") -> None:
    """Writes a PNG of score against size: per variant the main metric x 100, mean over the tasks, and the MB of the
    packed file or, with `axis_name` "multiply_adds", the encoder's work. Variants that lack a task are left out: their
    mean would be of other tasks. Variants named alike but for a number at the end ("ghost-0.25", "ghost-0.5") are
    joined by a line. The teacher's work is not in the results: its score is a dotted line."""
    grid = _Grid(results)
    label, size_of = SIZE_AXES[axis_name]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        teachers = [score for task in grid.tasks for scores in grid.teachers(task).values() for score in scores]
        if axis_name == "bytes":
            size = statistics.mean(run["teacher"]["bytes"] / 1e6 for task in grid.tasks for run in grid.column(task))
            _point(axis, "teacher", size, statistics.mean(teachers), "black")
        else:
            axis.axhline(statistics.mean(teachers), color="black", linewidth=0.8, linestyle=":")
        series: dict[str, list[tuple[float, float]]] = {}
        for variant in grid.variants:
            cells = [grid.cells.get((task, variant), []) for task in grid.tasks]
            if all(cells):
                score = statistics.mean(statistics.mean(main_score(run, "packed") for run in cell) for cell in cells)
                size = statistics.mean(size_of(run) for cell in cells for run in cell)
                name = re.sub(r"-[\d.]+$", "", variant)
                series.setdefault(name, []).append((size, score))
                _point(axis, variant, size, score, _COLOURS[list(series).index(name) % len(_COLOURS)])
        for index, points in enumerate(series.values()):
            if len(points) > 1:
                axis.plot(*zip(*sorted(points)), "-", color=_COLOURS[index % len(_COLOURS)], linewidth=1.0)
        axis.set_xscale("log")
        axis.margins(x=0.2, y=0.15)
        axis.set_xlabel(label)
        axis.set_ylabel(f"mean of {', '.join(task_label(task) for task in grid.tasks)}, x 100")
        axis.grid(alpha=0.3)

    _save_figure(draw, (7.0, 4.5), path)


def _point(axis: Any, name: str, x: float, y: float, colour: str) -> None:
    axis.plot([x], [y], "o", color=colour)
    axis.annotate(_literal(name), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)


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

    _save_figure(draw, (8.0, 3.0 * len(curves)), path)
