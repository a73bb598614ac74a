"""The outcome of runs as data: one run writes one `results.json` (schema version 1, fields in `_SCHEMA`).

Scores are stored as the metrics return them (accuracy 0.91).
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any


SCHEMA_VERSION = 1
RESULTS_NAME = "results.json"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


# A leaf is (what is expected, predicate); a dict is an object with these keys, where "*" stands for every key.
_TEXT = ("a non-empty string", lambda value: isinstance(value, str) and value != "")
_TEXT_OR_NULL = ("a string or null", lambda value: value is None or isinstance(value, str))
_NUMBER = ("a finite number", _is_number)
_INTEGER = ("an integer", _is_integer)
_COUNT = ("a positive integer", lambda value: _is_integer(value) and value > 0)
_STEPS = ("an integer of at least 0", lambda value: _is_integer(value) and value >= 0)
_DIGEST = ("64 lower-case hexadecimal digits", _is_digest)
_OBJECT = ("an object", lambda value: isinstance(value, dict))

_SCHEMA: dict[str, Any] = {
    "run": _TEXT,
    "recipe": _OBJECT,
    "fingerprint": _TEXT,
    "seed": _INTEGER,
    "task": _TEXT_OR_NULL,
    "split": _TEXT,
    "rows": _COUNT,
    "main_metric": _TEXT,
    "teacher": {"model": _TEXT, "metrics": {"*": _NUMBER}, "seed": _INTEGER, "bytes": _COUNT},
    "student": {"metrics": {"*": _NUMBER}},
    "packed": {"metrics": {"*": _NUMBER}, "bytes": _COUNT, "sha256": _DIGEST, "max_logit_difference": _NUMBER},
    "data": {"*": {"rows": _COUNT, "sha256": _DIGEST}},
    "stages": [{"name": _TEXT, "steps": _STEPS, "seconds": _NUMBER, "final_losses": {"*": _NUMBER}}],
    "versions": {"*": _TEXT},
    "commit": _TEXT_OR_NULL,
    "device": _TEXT,
    "seconds": _NUMBER,
}


FIELDS = ("schema", *_SCHEMA)
OPTIONAL_FIELDS = ("ghost_parameters", "multiply_adds")  # that older runs lack


def _check(value: Any, spec: Any, field: str, source: str) -> None:
    if isinstance(spec, dict):
        _check(value, _OBJECT, field, source)
        for key, inner in spec.items():
            if key == "*":
                for name, item in value.items():
                    _check(item, inner, f"{field}.{name}", source)
                continue
            name = f"{field}.{key}" if field else key
            if key not in value:
                raise ValueError(f"{source}: field {name!r} is missing")
            _check(value[key], inner, name, source)
    elif isinstance(spec, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{source}: field {field!r} must be a non-empty list, found {value!r:.200}")
        for index, item in enumerate(value):
            _check(item, spec[0], f"{field}.{index}", source)
    elif not spec[1](value):
        raise ValueError(f"{source}: field {field or 'top level'!r} must be {spec[0]}, found {value!r:.200}")


def validate_results(results: Any, source: str | Path) -> None:
    """Checks the content of a `results.json`.

    Args:
        results: the parsed content. Fields beyond the schema are allowed.
        source: file name for the message.

    Raises:
        ValueError: naming `source` and the field: unknown schema, missing field, wrong type, non-finite number.
    """
    source = str(source)
    _check(results, _OBJECT, "", source)
    if results.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{source}: field 'schema' must be {SCHEMA_VERSION}, found {results.get('schema')!r}")
    _check(results, _SCHEMA, "", source)
    for part in ("teacher", "student", "packed"):
        if results["main_metric"] not in results[part]["metrics"]:
            name = f"{part}.metrics.{results['main_metric']}"
            raise ValueError(f"{source}: field {name!r} is missing (it is the main metric)")
    if results["split"] not in results["data"]:
        raise ValueError(f"{source}: field 'data.{results['split']}' is missing (it is the evaluated split)")


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` so that a reader, also after a crash, sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Validates `results` (`schema` is added when absent) and writes them atomically as JSON to the file `path`."""
    results = {"schema": SCHEMA_VERSION, **results}
    validate_results(results, path)
    write_atomic(path, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_results(path: str | Path) -> dict[str, Any]:
    """Reads and validates one `results.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file, and the field where there is one (see `validate_results`).
    """
    try:
        results = json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    validate_results(results, path)
    return results


def variant_of(results: Mapping[str, Any]) -> str:
    """The run's name without its task and seed: 'sst2/twn/seed42' is the variant 'twn'."""
    drop = {results["task"], f"seed{results['seed']}"}
    return "/".join(part for part in results["run"].split("/") if part not in drop) or results["run"]


def _sweep_of(file: Path, run: str) -> str | None:
    """Name of the folder in which a sweep keeps this run, at <sweep>/<run>.json or <sweep>/<run>/results.json."""
    place = file.resolve().parent if file.name == RESULTS_NAME else file.resolve().with_suffix("")
    parts, own = place.parts, tuple(run.split("/"))
    return parts[-len(own) - 1] if len(own) > 1 and parts[-len(own) :] == own else None


def load_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Reads many result files, in the given order.

    Args:
        paths: files, or folders: of a folder every `results.json` below it, but for the copies that runs keep beside
            their checkpoints, or, when there is none, every `*.json` (as `trainers.sweep.collect` lays them).

    Where two sweeps have a variant of one name, both get the sweep's name before it: their runs are different ones.

    Raises:
        ValueError: a folder without results; a file that does not validate; two files of one run that disagree.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(path.rglob(RESULTS_NAME)) or sorted(path.rglob("*.json"))
            found = [file for file in found if file.parent.parent / RESULTS_NAME not in found]
        if not found:
            raise ValueError(f"{path}: the folder holds no {RESULTS_NAME} and no other JSON file")
        files.extend(found)
    known: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for file in files:
        results = read_results(file)
        first_file, first = known.setdefault((results["run"], results["fingerprint"]), (file, results))
        if any(first[part]["metrics"] != results[part]["metrics"] for part in ("teacher", "student", "packed")):
            raise ValueError(f"{file}: same run and fingerprint as {first_file}, but other metrics; keep one of them")
    sweeps: dict[str, set[str | None]] = {}
    for file, results in known.values():
        sweeps.setdefault(variant_of(results), set()).add(_sweep_of(file, results["run"]))
    loaded = []
    for file, results in known.values():
        sweep = _sweep_of(file, results["run"])
        if sweep is not None and len(sweeps[variant_of(results)]) > 1:
            results = {**results, "run": f"{sweep}/{results['run']}"}
        loaded.append(results)
    return loaded


def _git_commit(root: Path) -> str | None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Installed inside another project's checkout (its virtual environment), that project's commit says nothing.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        commit = git("rev-parse", "--verify", "HEAD")
        # results/ is excluded: a sweep that adds its own results there does not change the code of its later runs.
        dirty = git("status", "--porcelain", "--", ".", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if dirty else commit


def environment() -> dict[str, Any]:
    """What the run ran on, as the fields `versions`, `device` and `commit` of a `results.json`.

    Returns:
        `versions`: package name to version; `device`: text; `commit`: of this project's checkout, with "-dirty" when
        a file outside `results/` is changed or untracked, None outside a checkout.
    """
    import torch  # imported late: it takes seconds, reading results and rendering tables need none of it

    versions = {}
    for name in ("torch", "transformers", "datasets", "qbert-zoo"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"versions": versions, "device": device, "commit": _git_commit(Path(__file__).resolve().parent.parent)}
