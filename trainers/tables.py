"""Tables, rendered from results.

Scores are shown times 100. Nothing here is typed by hand; what papers report is in `published`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .published import METHODS, published_drop, published_method
from .results import RESULTS_NAME, load_results, read_results, variant_of


# GLUE's column order in the TernaryBERT paper; a task that is not here comes last under its own name.
TASK_LABELS = {
    "mnli": "MNLI",
    "qqp": "QQP",
    "qnli": "QNLI",
    "sst2": "SST-2",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "stsb_embedding": "STS-B by embeddings",
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


def main_score(results: Mapping[str, Any], part: str) -> float:
    """Main metric x 100 of `part`: "teacher", "student" (fake-quant) or "packed"."""
    return 100 * results[part]["metrics"][results["main_metric"]]


class Grid:
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
        for cell in self.cells.values():
            self._check_cell(cell)

    def _check_cell(self, cell: Sequence[Mapping[str, Any]]) -> None:
        """Spread is that of seeds: all else that a recipe says, and the rows trained on, must be the same."""
        for field, value in (
            ("recipe", lambda run: {k: v for k, v in run["recipe"].items() if k not in ("name", "seed")}),
            ("data", lambda run: run["data"]),
        ):
            for run in cell[1:]:
                differing = [
                    key
                    for key in value(run).keys() | value(cell[0]).keys()
                    if value(run).get(key) != value(cell[0]).get(key)
                ]
                if differing:
                    raise ValueError(
                        f"{run['run']!r} and {cell[0]['run']!r} differ in more than their seed: {field} "
                        f"{', '.join(sorted(differing))}; show them in separate tables"
                    )

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
        """Teacher name to the scores of its trainings, told apart by seed and score: one seed may have been trained on
        machines of different precision. Many runs share one teacher: it counts once."""
        distinct = {
            (run["teacher"]["model"], run["teacher"]["seed"], main_score(run, "teacher")) for run in self.column(task)
        }
        scores: dict[str, list[float]] = {}
        for model, _, score in sorted(distinct):
            scores.setdefault(model, []).append(score)
        return scores


def _cell(values: Sequence[float], digits: int = 2, counted: str = "seeds") -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({counted} {len(values)})"


def _drops(cell: Sequence[Mapping[str, Any]]) -> list[float]:
    return [main_score(run, "teacher") - main_score(run, "packed") for run in cell]


def _published(cell: Sequence[Mapping[str, Any]]) -> float | None:
    """The drop that the paper reports for all runs of a cell; None where it has none or several."""
    published = {published_drop(run) for run in cell}
    return published.pop() if len(published) == 1 else None


def _beside_the_papers(text: str, drop: float, paper: float | None) -> str:
    if paper is None:
        return text
    excess = round(drop - paper, 2)
    return f"{text}, paper {paper:.2f}" + (f", **{excess:.2f} over**" if excess > 0 else "")


def _drop_cell(cell: Sequence[Mapping[str, Any]]) -> str:
    drops = _drops(cell)
    return _beside_the_papers(_cell(drops), statistics.mean(drops), _published(cell))


def _mean_of_columns(columns: Sequence[Sequence[float]]) -> float | None:
    """Mean of the columns' means; None where a column is empty."""
    return statistics.mean(map(statistics.mean, columns)) if all(columns) else None


def _mean_cell(columns: Sequence[Mapping[int, float]], sign: str = "") -> str:
    """Mean of the columns' means, given by seed, ± deviation of the means of those seeds that all columns have."""
    mean = _mean_of_columns([list(column.values()) for column in columns])
    if mean is None:
        return "–"
    seeds = set.intersection(*map(set, columns))
    means = [statistics.mean(column[seed] for column in columns) for seed in seeds]
    return f"{mean:{sign}.2f}" + (f" ± {statistics.stdev(means):.2f} (seeds {len(means)})" if len(means) > 1 else "")


def _mean_drop_cell(cells: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    drops = [_by_seed(cell, _drops(cell)) for cell in cells]
    mean = _mean_of_columns([list(column.values()) for column in drops])
    if mean is None:
        return "–"
    published = [_published(cell) for cell in cells]
    return _beside_the_papers(_mean_cell(drops), mean, None if None in published else statistics.mean(published))


def _by_seed(cell: Sequence[Mapping[str, Any]], values: Sequence[float]) -> dict[int, float]:
    return {run["seed"]: value for run, value in zip(cell, values, strict=True)}


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def render_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table: tasks as columns; the teacher, then per run variant a row of scores and a row of drops.

    Each cell is mean ± sample standard deviation of the packed model's main metric x 100 over the seeds, with their
    number. A drop is teacher minus packed model, seed by seed against the run's own teacher; beside it stands the drop
    that the paper reports for BERT-base, and by how much ours is above it. Of several tasks the last column is the
    mean, for variants that have all of them; its deviation is over the seeds that all of them have.

    Args:
        results: contents of `results.json` files, for example from `load_results`.

    Raises:
        ValueError: runs of one task that differ in metric, split or rows, or two runs of one name and seed.
    """
    grid = Grid(results)
    titles = []
    for task in grid.tasks:
        titles.append(f"{task_label(task)} ({metric_label(grid.column(task)[0]['main_metric'])})")
    several = len(grid.tasks) > 1  # then there is a last column: their mean

    def row(title: str, cells: Iterable[str], mean: str) -> str:
        return _row([title, *cells, *([mean] if several else [])])

    lines = [row("", map(escape_markdown, titles), "mean"), row("---", ["---"] * len(titles), "---")]
    teachers = {task: grid.teachers(task) for task in grid.tasks}
    if all(len(scores) == 1 for scores in teachers.values()):
        columns = {"teacher": [next(iter(teachers[task].values())) for task in grid.tasks]}
    else:
        models = dict.fromkeys(model for scores in teachers.values() for model in scores)
        columns = {f"teacher {model}": [teachers[task].get(model, []) for task in grid.tasks] for model in models}
    for title, scores in columns.items():
        cells = (_cell(column, counted="trainings") if column else "–" for column in scores)
        mean = _mean_of_columns(scores)
        lines.append(row(escape_markdown(title), cells, "–" if mean is None else f"{mean:.2f}"))
    for variant in grid.variants:
        runs = [grid.cells.get((task, variant), []) for task in grid.tasks]
        scores = [[main_score(run, "packed") for run in cell] for cell in runs]
        title = escape_markdown(variant)
        mean = _mean_cell(list(map(_by_seed, runs, scores)))
        lines.append(row(title, (_cell(column) if column else "–" for column in scores), mean))
        cells = (_drop_cell(cell) if cell else "–" for cell in runs)
        lines.append(row(f"{title}: drop", cells, _mean_drop_cell(runs)))
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(grid))]) + "\n"


def render_distances(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of how far packed models are from their fine-tuned teachers: the mean squared difference of their
    logits on the evaluated split, mean ± sample standard deviation over the seeds. Runs without it are left out.

    Raises:
        ValueError: no run has it.
    """
    grid = Grid([run for run in results if "teacher_distance" in run["packed"]])
    lines = [_row(["", *(escape_markdown(task_label(task)) for task in grid.tasks)])]
    lines.append(_row(["---"] * (len(grid.tasks) + 1)))
    for variant in grid.variants:
        cells = [grid.cells.get((task, variant), []) for task in grid.tasks]
        distances = ([run["packed"]["teacher_distance"] for run in cell] for cell in cells)
        texts = (_cell(values, 4) if values else "–" for values in distances)
        lines.append(_row([escape_markdown(variant), *texts]))
    return "\n".join(lines) + "\n"


def render_differences(results: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """Markdown table of pairs of variants: first minus second, run by run with the same task, seed and teacher.

    For each pair a row of main metrics x 100 of the packed models and, where both recorded it, a row of how much
    farther in percent the first is from the teacher, by the mean squared difference of logits. Each cell is mean ±
    sample standard deviation over the runs that have a counterpart, with their number. What both runs share, teacher
    and the first epoch's order of batches, does not count as spread. Of several tasks the last column is the mean of
    those that the pair has.

    Raises:
        ValueError: a variant is unknown, or a pair has no runs to compare.
    """
    grid = Grid(results)
    several = len(grid.tasks) > 1
    lines = [["", *(escape_markdown(task_label(task)) for task in grid.tasks), *(["mean"] if several else [])]]
    lines.append(["---"] * len(lines[0]))
    for first, second in pairs:
        for name in (first, second):
            if name not in grid.variants:
                raise ValueError(f"variant: expected one of {', '.join(grid.variants)}, found {name!r}")
        scores: list[dict[int, float]] = []
        distances: list[dict[int, float]] = []
        for task in grid.tasks:
            scores.append({})
            distances.append({})
            others = {_rival_key(run): run for run in grid.cells.get((task, second), [])}
            for run in grid.cells.get((task, first), []):
                if other := others.get(_rival_key(run)):
                    scores[-1][run["seed"]] = main_score(run, "packed") - main_score(other, "packed")
                    here, there = (one["packed"].get("teacher_distance") for one in (run, other))
                    if here is not None and there:
                        distances[-1][run["seed"]] = 100 * (here / there - 1)
        if not any(scores):
            raise ValueError(f"{first} and {second} have no two runs of one task, seed and teacher")
        title = escape_markdown(f"{first} − {second}")
        for suffix, columns in (("", scores), (": distance, %", distances)):
            if any(columns):
                mean = [_mean_cell([column for column in columns if column], "+")] if several else []
                lines.append([title + suffix, *map(_difference_cell, columns), *mean])
    return "\n".join(map(_row, lines)) + "\n"


def _rival_key(run: Mapping[str, Any]) -> tuple[int, str, int, float]:
    return run["seed"], run["teacher"]["model"], run["teacher"]["seed"], main_score(run, "teacher")


def _difference_cell(values: Mapping[int, float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):+.2f}{spread} (pairs {len(values)})"


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
    grid = Grid(results)
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


def render_zoo(folder: str | Path) -> str:
    """Table of the checkpoints in a folder: their bits, size and score beside their teacher's."""
    lines = [["checkpoint", "W-E-A bits", "task", "score", "teacher", "file", "teacher's"], ["---"] * 7]
    for path in sorted(Path(folder).glob(f"*/{RESULTS_NAME}")):
        results, config = read_results(path), json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        planes = ", two planes" if config.get("planes") == 2 and "1" in config["bits"].split("-")[:2] else ""
        lines.append(
            [
                f"[{escape_markdown(path.parent.name)}]({path.parent.relative_to(Path(folder).parent).as_posix()})",
                config["bits"] + planes,
                escape_markdown(f"{task_label(results['task'])} ({metric_label(results['main_metric'])})"),
                *(f"{main_score(results, part):.2f}" for part in ("packed", "teacher")),
                *(f"{results[part]['bytes'] / 1e6:.2f} MB" for part in ("packed", "teacher")),
            ]
        )
    return "\n".join(map(_row, lines)) + "\n"


_BLOCK = re.compile(
    r"(<!-- qbert (table|distances|differences|zoo) (\S+)((?: [^\s:]+:[^\s:]+)*) -->\n)"
    r"(?:(?!<!-- qbert ).)*?(<!-- end -->)",
    re.DOTALL,
)
_BEGINNING = re.compile(r"<!-- qbert (?:table|distances|differences|zoo)\b.*")
_RENDER = {"table": render_table, "distances": render_distances, "differences": render_differences}


def update_tables(text: str, root: str | Path) -> str:
    """`text` with every block `<!-- qbert table FOLDER -->` ... `<!-- end -->` rendered again from the results in that
    folder, relative to `root`; `<!-- qbert distances FOLDER -->` and `<!-- qbert differences FOLDER FIRST:SECOND -->`
    (any number of pairs) as well, and `<!-- qbert zoo FOLDER -->` from its checkpoints. Several folders are joined by
    `+`.

    Raises:
        ValueError: the text has no such block, or one that is malformed or has no end; a folder has no results; a
            block has pairs that should have none or the other way round.
    """
    blocks = [block.start() for block in _BLOCK.finditer(text)]
    if not blocks:
        raise ValueError("expected blocks '<!-- qbert table FOLDER -->' ... '<!-- end -->', found none")
    for beginning in _BEGINNING.finditer(text):
        if beginning.start() not in blocks and not text[: beginning.start()].endswith("`"):  # in prose it is code
            raise ValueError(f"{beginning[0]}: expected FOLDER, or FOLDER and pairs, and '<!-- end -->' behind it")

    def render(block: re.Match) -> str:
        pairs = [tuple(pair.split(":")) for pair in block[4].split()]
        if bool(pairs) != (block[2] == "differences"):
            raise ValueError(f"{block[1].strip()}: pairs FIRST:SECOND are for differences, which need at least one")
        if block[2] == "zoo":
            return block[1] + render_zoo(Path(root) / block[3]) + block[5]
        runs = load_results([Path(root) / folder for folder in block[3].split("+")])
        return block[1] + _RENDER[block[2]](runs, *([pairs] if pairs else [])) + block[5]

    return _BLOCK.sub(render, text)


def _notes(grid: Grid) -> list[str]:
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
    mean = " Mean: of the columns, where a row has all; ± over the seeds that all have." if len(grid.tasks) > 1 else ""
    return [
        "Main metric x 100 of the packed model, mean ± sample standard deviation over the seeds. Drop: teacher minus "
        f"packed model, each run against its own teacher; negative is a gain.{mean}{_trainings_note(runs)}",
        _paper_note(grid, benchmark),
        f"Evaluated on: {', '.join(rows)}. Runs: {len(runs)}. Seeds: {', '.join(map(str, seeds))}. "
        f"Commits: {escape_markdown(', '.join(commit[:7] + commit[40:] for commit in commits))}. "
        f"Devices: {escape_markdown('; '.join(devices))}.",
    ]


def _trainings_note(runs: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({run["teacher"]["seed"] for run in runs})
    if len(seeds) > 1 or len({run["device"] for run in runs}) == 1:
        return ""
    return f" Trainings: teachers have seed {seeds[0]} alone, trained again where machines differ (devices below)."


def _paper_note(grid: Grid, benchmark: str) -> str:
    """Whose drop stands beside which variant's."""
    variants: dict[str, list[str]] = {}
    for (_, variant), cell in grid.cells.items():
        for run in cell:
            if published_drop(run) is not None:
                names = variants.setdefault(METHODS[published_method(run)][0], [])
                names += [variant] * (variant not in names)
    if not variants:
        return "Paper: no drop is known to us for networks made like these."
    whose = "; ".join(
        paper if len(names) == len(grid.variants) else f"{paper} for {', '.join(sorted(names))}"
        for paper, names in variants.items()
    )
    return (
        f"Paper: drop of BERT-base on {benchmark} dev at the same bits with the same weight quantizer, "
        f"{escape_markdown(whose)}; **over** marks a mean drop above it."
    )
