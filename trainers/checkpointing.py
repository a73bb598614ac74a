"""Trainer checkpoints that a crash cannot break: written aside, described by a manifest, then renamed into place.

A checkpoint `checkpoint-N` is complete when its `MANIFEST.json`, written last, names every file with size and SHA-256
and they match. Transformers writes straight into `checkpoint-N` and resumes from the highest N whatever is in it.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy

from .machine import freed_memory_kept


logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
SCHEMA = 1
STAGING = "tmp-checkpoint-"
KEEP_AT_LEAST = 2  # the newest, and one to fall back on when it is damaged


def newest_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """Path of the checkpoint with the highest step in `folder` whose files all match its manifest.

    Damaged checkpoints on the way are skipped with a warning that names the file. None if there is no complete one.
    """
    for _, checkpoint in reversed(_checkpoints(Path(folder))):
        try:
            verify_checkpoint_files(checkpoint)
        except ValueError as damage:
            logger.warning("skipping a damaged checkpoint: %s", damage)
        else:
            return str(checkpoint)
    return None


def verify_checkpoint_files(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a checkpoint, after comparing every file's size and SHA-256 with it.

    Raises:
        ValueError: the first file that is missing or differs, with what was expected and found.
    """
    checkpoint = Path(checkpoint)
    manifest = _read_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        _check_size(checkpoint / name, expected["bytes"])
    for name, expected in manifest["files"].items():
        found = _sha256(checkpoint / name)
        if found != expected["sha256"]:
            raise ValueError(f"{checkpoint / name}: expected SHA-256 {expected['sha256']}, found {found}")
    return manifest


@contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Makes `folder` this process's own for the time of a `with` block; creates it if needed.

    The operating system drops the lock when the process ends, however it ends; the file `.lock` may stay.

    Raises:
        RuntimeError: another run, or this process already, holds the folder.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # A POSIX lock does not keep the process that owns it from taking it again, and closing any handle drops it.
    if folder in _locked:
        raise RuntimeError(f"{folder} is already in use by this process")
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise RuntimeError(f"{folder} is in use by another run: {file.read().strip()}") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        _locked.add(folder)
        try:
            yield
        finally:
            _locked.discard(folder)


_locked: set[Path] = set()


class AtomicCheckpointMixin:
    """Mix into a `transformers.Trainer`, before it: atomic checkpoints, strict resume, only finite numbers.

    - A checkpoint appears under its name only when it is complete; a failed save leaves the older ones untouched.
    - Rotation goes by step number and keeps at least two complete checkpoints.
    - `train` locks `output_dir`, refuses to start anew where complete checkpoints lie, and resumes only from a
      checkpoint that verifies, carries the same identity and holds optimizer, scheduler and random state.
    - A resumed run goes on where it was, also within an epoch grouped by length, after an evaluation and after the
      last step; `training_seconds` is the time of all its processes.
    - A non-finite loss or gradient norm raises `FloatingPointError` before the optimizer step.

    Args:
        identity: what the run depends on (recipe, stage, teacher, data, seed), as JSON values. Kept in every manifest.

    Raises:
        ValueError: `save_total_limit=1`, or `push_to_hub`, which would upload checkpoints while they are written.
    """

    def __init__(self, *args: Any, identity: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        limit = self.args.save_total_limit
        if limit is not None and 0 < limit < KEEP_AT_LEAST:
            raise ValueError(f"save_total_limit={limit} leaves nothing to fall back on; use {KEEP_AT_LEAST} or more")
        if self.args.push_to_hub:
            raise ValueError("push_to_hub=True is not supported; call push_to_hub() when training is done")
        self.identity: dict[str, Any] = json.loads(json.dumps(identity or {}))
        self._staging: Path | None = None
        self._step_losses: dict[str, Tensor] = {}
        self._give_back_memory = lambda: None
        self._order: _EpochOrder | None = None
        self._resumed_from: str | None = None
        self._earlier_seconds, self._started = 0.0, time.time()
        self.add_callback(_SaveAfterEvaluation())

    @property
    def training_seconds(self) -> float:
        """Time in `train` up to now, and that of earlier processes up to the checkpoint that this one resumed from."""
        return self._earlier_seconds + time.time() - self._started

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the newest complete checkpoint of `output_dir`."""
        folder = Path(self.args.output_dir)
        with folder_lock(folder) if self.args.should_save else nullcontext():
            if self.args.should_save:
                for stale in folder.glob(f"{STAGING}*"):
                    shutil.rmtree(stale)
            self._started, self._earlier_seconds = time.time(), 0.0
            checkpoint = self._resumed_from = self._checked_resume(folder, resume_from_checkpoint)
            self._step_losses = {}
            try:
                with freed_memory_kept() as self._give_back_memory:
                    return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            finally:
                self._resumed_from = self._order = None

    def _checked_resume(self, folder: Path, requested: str | bool | None) -> str | None:
        newest = None if isinstance(requested, str) else newest_complete_checkpoint(folder)
        if not requested:
            if newest is not None:
                raise ValueError(f"{newest} exists: resume from it, or choose an empty output_dir")
            return None
        if requested is True and newest is None:
            raise ValueError(f"no complete checkpoint in {folder} to resume from")
        checkpoint = newest if requested is True else str(requested)
        manifest = verify_checkpoint_files(checkpoint)
        differences = _differences(manifest["identity"], self.identity)
        if differences:
            raise ValueError(f"{checkpoint} belongs to another run:\n  " + "\n  ".join(differences))
        rng = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}.pth"
        for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", rng):
            if name not in manifest["files"]:
                raise ValueError(f"{checkpoint} cannot be resumed from: it was saved without {name}")
        if manifest["versions"] != _versions():
            logger.warning("%s was written with %s, now %s", checkpoint, manifest["versions"], _versions())
        self._earlier_seconds = manifest.get("seconds", 0.0)
        return checkpoint

    def _get_train_sampler(self, *args: Any, **kwargs: Any):
        """As the Trainer's; one grouped by length draws the epoch that a run resumes in as it was drawn before."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        self._order = _EpochOrder(sampler.batch_size, lengths=sampler.lengths)
        if self._resumed_from is not None:
            path = Path(self._resumed_from, self._order_name)
            if path.is_file():
                self._order.redraw_from = load_file(path)["drawn_from"]
            elif self.args.process_index == 0 or not self.accelerator.dispatch_batches:  # else the first one draws
                raise ValueError(f"{path.parent} cannot be resumed from: it was saved without {path.name}")
        return self._order

    @property
    def _order_name(self) -> str:
        return f"order_{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._order is not None and self._order.drawn_from is not None:
            save_file({"drawn_from": self._order.drawn_from}, Path(output_dir, self._order_name))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the Trainer, which calls it before it draws a new epoch, or after it drew the one that it resumes in."""
        super()._load_rng_state(checkpoint)
        if self._order is not None:
            self._order.redraw_from = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer; nothing where all steps are done, which it would only see after one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises where the Trainer warns: a resumed model must take every tensor of the checkpoint and lack none."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [key for key in load_result.missing_keys if key not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit {type(self.model).__name__}: "
                f"missing {missing}, unexpected {load_result.unexpected_keys}"
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # a pickle that nothing here reads
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes `tmp-checkpoint-N.<pid>/checkpoint-N`, then moves it into place and removes what is too old."""
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FloatingPointError(f"step {step}: {name} is not finite; no checkpoint written")
        staging = folder / f"{STAGING}{step}.{os.getpid()}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        # one name for all processes: each writes its own random state
        staging = Path(*broadcast_object_list([str(staging)]))
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            best = self.state.best_global_step
            if best and (best == step or (folder / f"checkpoint-{best}").is_dir()):
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = staging / f"checkpoint-{step}"
                self.state.save_to_json(str(written / "trainer_state.json"))
                _write_manifest(written, step, self.identity, self.training_seconds)
                _publish(written, folder / written.name)
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and self.args.save_total_limit:
            _rotate(folder, step, self.args.save_total_limit, self.state.best_model_checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._add_step_losses(loss=loss)
        self._give_back_memory()
        return loss

    def _add_step_losses(self, **losses: Tensor) -> None:
        """Sums scalar losses by name over the micro-batches of one optimizer step."""
        for name, value in losses.items():
            self._step_losses[name] = self._step_losses[name] + value if name in self._step_losses else value

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None):
        """As the Trainer, which calls it right before the optimizer step; raises on a non-finite loss or norm."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._step_losses = self._step_losses, {}
        norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=self.args.device)
        values = torch.stack([*losses.values(), norm]).tolist()  # the step's one host sync
        checked = dict(zip([*losses, "gradient norm"], values, strict=True))
        # A gradient scaler (float16) expects overflows and skips those steps itself.
        if getattr(self.accelerator, "scaler", None) is not None:
            del checked["gradient norm"]
        for name, value in checked.items():
            if not math.isfinite(value):
                step = self.state.global_step + 1
                raise FloatingPointError(f"step {step}: {name} is {value}; stopped before the optimizer step")
        self._on_step_losses({name: checked[name] for name in losses})
        return grad_norm

    def _on_step_losses(self, losses: dict[str, float]) -> None:
        """Called with the summed losses of every optimizer step."""


class _EpochOrder(LengthGroupedSampler):
    """Draws each epoch's order as Transformers' does, from torch's random state, and remembers that state.

    A run that resumes within an epoch needs the epoch's own order, but the Trainer restores a random state, and that
    of a later step, only after it has drawn one.
    """

    drawn_from: Tensor | None = None
    redraw_from: Tensor | None = None

    def __iter__(self) -> Iterator[int]:
        if self.redraw_from is not None:
            torch.set_rng_state(self.redraw_from)
            self.redraw_from = None
        self.drawn_from = torch.get_rng_state()
        return super().__iter__()


class _SaveAfterEvaluation(TrainerCallback):
    """Puts off the save of an epoch's last step until after the evaluation that ends the epoch: that draws random
    numbers too, and a run resumed from before it would not evaluate again."""

    due = False

    def on_train_begin(self, args, state, control, **kwargs):  # noqa: ARG002
        self.due = False

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        ends = state.epoch == int(state.epoch) and state.global_step < state.max_steps
        if ends and control.should_save and args.eval_strategy == IntervalStrategy.EPOCH:
            self.due, control.should_save = True, False

    def on_epoch_end(self, args, state, control, **kwargs):  # noqa: ARG002
        if self.due:
            self.due, control.should_save = False, True


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every `checkpoint-N` folder, in the order of the steps; modification times play no part."""
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def _rotate(folder: Path, step: int, limit: int, best: str | None) -> None:
    """Removes the oldest complete checkpoints up to `step` beyond `limit`, but never the best one."""
    complete = []
    for found, checkpoint in _checkpoints(folder):
        try:
            for name, expected in _read_manifest(checkpoint)["files"].items():
                _check_size(checkpoint / name, expected["bytes"])
        except ValueError:
            continue
        if found <= step:
            complete.append(checkpoint)
    if not complete or complete[-1].name != f"checkpoint-{step}":
        raise RuntimeError(f"checkpoint-{step} in {folder} is not complete after its save; older ones are kept")
    for checkpoint in complete[: -max(limit, KEEP_AT_LEAST)]:
        if best is None or checkpoint.resolve() != Path(best).resolve():
            # renamed first, so that a crash in between leaves no half of a checkpoint under its name
            removed = checkpoint.with_name(f"{STAGING}{checkpoint.name}.{os.getpid()}")
            os.rename(checkpoint, removed)
            shutil.rmtree(removed)


def _write_manifest(checkpoint: Path, step: int, identity: Mapping[str, Any], seconds: float) -> None:
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        _fsync(path)
        files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"schema": SCHEMA, "step": step, "identity": identity, "versions": _versions(), "files": files}
    manifest["seconds"] = seconds
    manifest["sha256"] = _digest(manifest)
    path = checkpoint / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    _fsync(path)
    for folder in (*(path for path in checkpoint.rglob("*") if path.is_dir()), checkpoint):
        _fsync(folder)


def _publish(written: Path, final: Path) -> None:
    if final.exists():  # damaged, and passed over when this run resumed
        os.rename(final, written.with_name("replaced"))
    os.rename(written, final)
    _fsync(final.parent)


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint was not written to its end, or not by this package")
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("sha256")
        intact = digest == _digest(manifest) and manifest["schema"] == SCHEMA
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not intact:
        raise ValueError(f"{path} is damaged, or not of schema {SCHEMA}")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: expected {expected} bytes, found {path.stat().st_size}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "qbert-zoo"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a source tree that is not installed
            versions[package] = "unknown"
    return versions


def _differences(saved: Any, current: Any, path: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        lines = []
        for key in sorted(saved.keys() | current.keys()):
            lines += _differences(saved.get(key), current.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if saved == current else [f"{path}: checkpoint {saved!r}, this run {current!r}"]
