"""Sweeps: one recipe x run variants x tasks x seeds, resumable, one folder and one small JSON per run.

Sweep file:

    name: minilm                      # folder name of the sweep
    recipe: recipes/minilm.yaml       # relative to this file
    tasks: [sst2, mrpc]               # optional; each becomes data.task
    seeds: {sst2: [42], mrpc: [42, 43, 44]}   # optional; or one list for all tasks
    task_overrides:                   # optional
      mrpc: {stages.0.training.num_train_epochs: 5}
    runs:                             # variant name -> overrides as a list, as a mapping, or nothing
      twn:
      lat: [quantization.weight_quantizer=lat]
      binary: {recipe: recipes/binary.yaml, packing: dense}   # a mapping may name another recipe

Later overrides win, in the order task, task_overrides, runs, seed. Layout, `<run>` being `sst2/twn/seed42`:

    <output>/<sweep>/<run>/results.json    finished run, beside whatever else the run leaves in its folder
    <output>/<sweep>/<run>.log             when it started, failed (with traceback) and finished
    <output>/<sweep>/<run>.lock            held by the process that runs it
    <results>/<sweep>/<run>.json           copy for version control, written by `collect`
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .recipe import FOLDER_NAME, Recipe
from .results import FIELDS, OPTIONAL_FIELDS, RESULTS_NAME, read_results, validate_results, write_results
from .tables import main_score, metric_label
from .typed import UniqueKeyLoader, build_dataclass


Execute = Callable[[Recipe, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """One recipe of a sweep. `name` is also its folder `path`, relative to the sweep's output folder."""

    name: str
    recipe: Recipe
    path: Path


@dataclass(frozen=True)
class Sweep:
    name: str
    runs: tuple[Run, ...]


@dataclass
class SweepOutcome:
    """Names of the runs by what became of them; `failed` maps to the log file."""

    finished: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    locked: list[str] = field(default_factory=list)
    failed: dict[str, Path] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0


@dataclass(frozen=True)
class _SweepFile:
    name: str
    recipe: str
    runs: dict[str, Any]
    tasks: list[str] | None = None
    seeds: list[int] | dict[str, Any] | None = None
    task_overrides: dict[str, Any] = field(default_factory=dict)


def _dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted key; a list of plain values is a leaf."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    flat: dict[str, Any] = {}
    for key, value in items:
        nested = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        if isinstance(value, Mapping) and value or any(isinstance(item, Mapping | list) for item in nested):
            flat.update(_dotted(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


_OWN_FIELDS = {"data.task": "tasks", "seed": "seeds"}


def _overrides(values: Any, where: str) -> list[str]:
    if values is None:
        return []
    if isinstance(values, dict):
        # JSON is YAML, which is how an override's value is read.
        values = [f"{key}={json.dumps(value)}" for key, value in _dotted(values).items()]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: expected a list of key=value or a mapping, found {values!r}")
    for value in values:
        key = value.partition("=")[0].strip()
        if key in _OWN_FIELDS:
            raise ValueError(f"{where}: {key} is set by the sweep's own field `{_OWN_FIELDS[key]}`")
    return values


def _seeds(seeds: Any, where: str) -> list[int]:
    valid = isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)
    if not valid or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: expected a list of different integers, found {seeds!r}")
    return seeds


def _check_names(names: Sequence[Any], where: str) -> None:
    if not names:
        raise ValueError(f"{where}: expected at least one entry, found none")
    for name in names:
        if not isinstance(name, str) or not FOLDER_NAME.fullmatch(name) or re.fullmatch(r"seed\d+", name):
            raise ValueError(
                f"{where}: expected names of letters, digits, '.', '_' and '-' that are not a seed, found {name!r}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: expected different names, found {list(names)!r}")


def _expand(path: Path, data_path: str | Path | None) -> Sweep:
    values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    spec = build_dataclass(_SweepFile, values, "")
    tasks: list[str | None] = [None] if spec.tasks is None else list(spec.tasks)
    known = [] if spec.tasks is None else tasks
    _check_names([spec.name], "name")
    _check_names(list(spec.runs), "runs")
    if spec.tasks is not None:
        _check_names(tasks, "tasks")
        _check_names([*tasks, *spec.runs], "tasks and runs")
    for name, mapping in (("seeds", spec.seeds), ("task_overrides", spec.task_overrides)):
        for task in mapping if isinstance(mapping, dict) else ():
            if task not in known:
                raise ValueError(f"{name}.{task}: expected a task of `tasks` ({', '.join(known)}), found none")
    data = [] if data_path is None else [f"data.path={json.dumps(str(data_path))}"]

    def build(task: str | None, variant: str, seed: int | None) -> Run:
        overrides = [] if task is None else [f"data.task={task}"]
        overrides += _overrides(spec.task_overrides.get(task), f"task_overrides.{task}")
        own = spec.runs[variant]
        own = dict(own) if isinstance(own, dict) else own
        recipe_name = own.pop("recipe", spec.recipe) if isinstance(own, dict) else spec.recipe
        overrides += _overrides(own, f"runs.{variant}")
        overrides += ([] if seed is None else [f"seed={seed}"]) + data
        try:
            recipe = Recipe.from_yaml(path.parent / recipe_name, overrides)
        except ValueError as error:
            raise ValueError(f"runs.{variant}{f' on {task}' if task else ''}: {error}") from error
        label = task or recipe.data.task
        name = "/".join([*([label] if label else []), variant, f"seed{recipe.seed}"])
        return Run(name, recipe, Path(name))

    by_task = []
    for task in tasks:
        seeds = spec.seeds
        if isinstance(seeds, dict):
            if task not in seeds:
                raise ValueError(f"seeds: expected seeds for every task, found none for {task}")
            seeds = seeds[task]
        by_task.append([None] if seeds is None else _seeds(seeds, "seeds" if task is None else f"seeds of {task}"))
    # The first seed of every cell comes before any second seed, so that an unfinished sweep is a whole table already.
    runs = [
        build(task, variant, seeds[index])
        for index in range(max(map(len, by_task)))
        for task, seeds in zip(tasks, by_task, strict=True)
        if index < len(seeds)
        for variant in spec.runs
    ]
    first: dict[str, str] = {}
    for run in runs:
        other = first.setdefault(run.recipe.fingerprint(), run.name)
        if other != run.name:
            raise ValueError(f"runs: {other} and {run.name} have the same recipe; expected runs that differ")
    return Sweep(spec.name, tuple(runs))


def load_sweep(path: str | Path, data_path: str | Path | None = None) -> Sweep:
    """Reads a sweep file (format in the module's docstring) and expands it.

    Args:
        path: YAML file.
        data_path: `data.path` of every run: where this machine keeps the data.

    Returns:
        Runs in the order to be run: seed by seed, then task by task, then variant by variant.

    Raises:
        ValueError: naming the file and the field, including errors in the recipe with a run's overrides.
    """
    try:
        return _expand(Path(path), data_path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected a readable YAML sweep, found: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_recipe(run: Run, results: Mapping[str, Any], path: Path) -> None:
    """Raises `ValueError` telling what differs when `results` are not those of the run's recipe."""
    if results["fingerprint"] == run.recipe.fingerprint():
        return
    try:
        # Results written before the recipe had some field: read again, the field takes its default.
        recipe = Recipe.from_portable(results["recipe"])
        if recipe.fingerprint() == run.recipe.fingerprint():
            return
        found = _dotted(recipe.portable())
    except ValueError:
        found = _dotted(results["recipe"])
    expected = _dotted(run.recipe.portable())
    keys = [key for key in {**expected, **found} if expected.get(key, "absent") != found.get(key, "absent")]
    differences = (f"{key} is {found.get(key, 'absent')!r}, now {expected.get(key, 'absent')!r}" for key in keys)
    raise ValueError(
        f"{path}: results of another recipe than {run.name} has now: {'; '.join(differences)}. "
        "Give the run another name, or remove the old results"
    )


def _saved_results(run: Run, folder: Path, committed: Path | None) -> dict[str, Any] | None:
    """The run's results when it is finished, here or in the committed folder; `ValueError` when of another recipe."""
    path = folder / run.path / RESULTS_NAME
    if path.exists():
        results = read_results(path)
        _check_recipe(run, results, path)
        if results["run"] != run.name:
            # Written by the runner, which was killed before the sweep could give it the run's name.
            results["run"] = run.name
            write_results(path, results)
        return results
    if committed is not None and (path := committed / f"{run.name}.json").exists():
        results = read_results(path)
        _check_recipe(run, results, path)
        return results
    return None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process got the lock. A record lock: it ends with the process, also by kill -9, and worker
    processes forked meanwhile do not keep it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of them depends on the platform
            yield False
        else:
            yield True


def _log(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}\n")


def _attempt(run: Run, folder: Path, committed: Path | None, execute: Execute) -> str:
    """Runs one run unless it is locked or finished. Returns the name of its list in `SweepOutcome`."""
    log = folder / f"{run.name}.log"
    with _locked(folder / f"{run.name}.lock") as acquired:
        if not acquired:
            return "locked"
        try:
            # Another process may have finished it since the sweep began.
            if _saved_results(run, folder, committed) is not None:
                return "skipped"
            _log(log, f"{run.name} started, recipe fingerprint {run.recipe.fingerprint()}")
            target = folder / run.path
            target.mkdir(parents=True, exist_ok=True)
            results = {**execute(run.recipe, target), "run": run.name}
            validate_results(results, "results of execute")
            _check_recipe(run, results, target / RESULTS_NAME)
            write_results(target / RESULTS_NAME, results)
        except Exception:
            _log(log, f"{run.name} failed\n{traceback.format_exc()}")
            return "failed"
        _log(log, f"{run.name} finished")
        return "finished"


_STATUSES = ("finished", "skipped", "locked", "failed")
_FIRST_CODE = 90  # exit code of the first status; Python, shells and signals use low and high ones


def _child(run: Run, folder: Path, committed: Path | None, execute: Execute, threads: int) -> None:
    """Body of a run's own process: prints go to the run's log, the status is the exit code."""
    import torch

    log = folder / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)
    sys.exit(_FIRST_CODE + _STATUSES.index(_attempt(run, folder, committed, execute)))


def _in_processes(
    runs: Sequence[Run], folder: Path, committed: Path | None, execute: Execute, jobs: int
) -> Iterator[tuple[Run, str, float]]:
    """Yields (run, status, seconds) as processes end, `jobs` at a time. A process that dies is a failed run."""
    import torch  # imported late: it takes seconds, a sweep that is finished needs none of it

    context = multiprocessing.get_context("spawn")  # forking after torch has started threads may hang
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = list(reversed(runs))
    active: dict[Any, tuple[Any, Run, float]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop()
                process = context.Process(target=_child, args=(run, folder, committed, execute, threads))
                process.start()
                active[process.sentinel] = (process, run, time.monotonic())
            for sentinel in multiprocessing.connection.wait(list(active)):
                process, run, start = active.pop(sentinel)
                process.join()
                code = process.exitcode - _FIRST_CODE
                known = code in range(len(_STATUSES))
                status = _STATUSES[code] if known else "failed"
                if not known:
                    _log(folder / f"{run.name}.log", f"{run.name} failed: its process ended with {process.exitcode}")
                yield run, status, time.monotonic() - start
    finally:
        for process, _, _ in active.values():
            process.terminate()
        for process, _, _ in active.values():
            process.join()


def _in_turn(
    runs: Sequence[Run], folder: Path, committed: Path | None, execute: Execute
) -> Iterator[tuple[Run, str, float]]:
    for run in runs:
        start = time.monotonic()
        yield run, _attempt(run, folder, committed, execute), time.monotonic() - start


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Clock:
    """Time left, from the runs executed so far: a task's runs take as long as its earlier ones."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.seconds: dict[str | None, list[float]] = {}

    def add(self, run: Run, seconds: float) -> None:
        self.seconds.setdefault(run.recipe.data.task, []).append(seconds)

    def eta(self, runs: Sequence[Run]) -> str:
        known = [seconds for values in self.seconds.values() for seconds in values]
        if not runs or not known:
            return ""
        expected = 0.0
        for run in runs:
            values = self.seconds.get(run.recipe.data.task, known)
            expected += sum(values) / len(values)
        return f", ETA {_duration(expected / min(self.jobs, len(runs)))}"


def _score_line(results: Mapping[str, Any]) -> str:
    teacher, packed = main_score(results, "teacher"), main_score(results, "packed")
    metric = metric_label(results["main_metric"])
    return f"{metric} {packed:.2f}, teacher {teacher:.2f}, drop {teacher - packed:.2f}"


def _select(runs: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
    for pattern in only or ():
        if not any(fnmatch.fnmatchcase(run.name, pattern) for run in runs):
            raise ValueError(f"only: no run matches {pattern!r}; runs: {', '.join(run.name for run in runs)}")
    return [run for run in runs if not only or any(fnmatch.fnmatchcase(run.name, pattern) for pattern in only)]


def run_sweep(
    sweep_path: str | Path,
    output: str | Path,
    data_path: str | Path | None = None,
    only: Sequence[str] | None = None,
    jobs: int = 1,
    *,
    execute: Execute,
    results: str | Path | None = None,
) -> SweepOutcome:
    """Runs what is not finished yet. Can be interrupted, killed and started again, also by several processes at once.

    Args:
        sweep_path: sweep file.
        output: folder; the sweep's own folder goes below it.
        data_path: `data.path` of every run.
        only: patterns of run names, such as "sst2/*" or "*/lat/*".
        jobs: runs at a time. Above 1 each run has its own process, which shares torch's threads; `execute` must then
            be importable by name, and the calling script needs its `if __name__ == "__main__"`.
        execute: called as `execute(recipe, folder)`; resumes what it finds in the folder and returns the content of
            `results.json`, which is written there.
        results: folder of committed results (see `collect`): a run with its JSON there counts as finished.

    Returns:
        What became of each run. A failed run is in its log file and does not stop the sweep; `exit_code` is then 1.

    Raises:
        ValueError: bad sweep file; or, before anything runs, existing results that belong to another recipe.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, found {jobs}")
    sweep = load_sweep(sweep_path, data_path)
    runs = _select(sweep.runs, only)
    folder = Path(output) / sweep.name
    committed = None if results is None else Path(results) / sweep.name
    outcome = SweepOutcome()
    pending, errors = [], []
    for run in runs:
        try:
            finished = _saved_results(run, folder, committed) is not None
        except ValueError as error:
            errors.append(str(error))
            continue
        if finished:
            outcome.skipped.append(run.name)
        else:
            pending.append(run)
    if errors:
        raise ValueError("\n".join(errors))
    print(f"sweep {sweep.name}: {len(runs)} runs, {len(outcome.skipped)} finished before", flush=True)
    clock, left = _Clock(jobs), list(pending)
    turns = _in_turn(pending, folder, committed, execute)
    if jobs > 1:
        turns = _in_processes(pending, folder, committed, execute, jobs)
    for run, status, seconds in turns:
        left.remove(run)
        log = folder / f"{run.name}.log"
        if status == "finished":
            clock.add(run, seconds)
            outcome.finished.append(run.name)
            text = f"{_score_line(read_results(folder / run.path / RESULTS_NAME))}, {_duration(seconds)}"
        elif status == "failed":
            outcome.failed[run.name] = log
            text = f"FAILED, see {log}"
        elif status == "locked":
            outcome.locked.append(run.name)
            text = "skipped: another process is running it"
        else:
            outcome.skipped.append(run.name)
            text = "skipped: another process has finished it"
        print(f"[{len(runs) - len(left)}/{len(runs)}] {run.name}: {text}{clock.eta(left)}", flush=True)
    print(
        f"sweep {sweep.name}: {len(outcome.finished)} finished, {len(outcome.skipped)} finished before, "
        f"{len(outcome.locked)} running elsewhere, {len(outcome.failed)} failed",
        flush=True,
    )
    return outcome


def collect(output: str | Path, results: str | Path) -> list[Path]:
    """Copies the finished runs of a sweep, finished or not, into a folder for version control.

    Args:
        output: the sweep's own folder, `<output>/<sweep>` of `run_sweep`.
        results: folder that gets `<sweep>/<run>.json`, each with the fields of `trainers.results` only.
            `run_sweep(results=...)` on another machine continues from these files alone.

    Returns:
        The files written. A run that is there already is left as it is: its numbers may have been published.

    Raises:
        ValueError: no sweep folder, a `results.json` that does not validate, or a collected run of another recipe.
    """
    output, results = Path(output).resolve(), Path(results)
    if not output.is_dir():
        raise ValueError(f"{output}: expected the folder of a sweep, found none")
    written = []
    for path in sorted(output.rglob(RESULTS_NAME)):
        content = read_results(path)
        if content["run"] != path.parent.relative_to(output).as_posix():
            continue  # a copy inside a run's folder, beside a checkpoint
        target = results / output.name / f"{content['run']}.json"
        if target.exists():
            run = Run(content["run"], Recipe.from_portable(content["recipe"]), Path(content["run"]))
            _check_recipe(run, read_results(target), target)
            continue
        write_results(target, {key: content[key] for key in (*FIELDS, *OPTIONAL_FIELDS) if key in content})
        written.append(target)
    return written
