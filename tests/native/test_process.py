"""The engine among threads, forks, and processes without it."""

import ctypes
import hashlib
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
import torch


sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "modeling"))

from tiny import inputs, latent  # noqa: E402

from modeling_qbert import native  # noqa: E402
from modeling_qbert.packing import pack_codes  # noqa: E402


PACKAGE = pathlib.Path(native.__file__).parent


@torch.no_grad()
def answer(model, given):
    return model(**given)[0]


def _child(queue, model, given):
    queue.put(answer(model, given).numpy())


def test_a_forked_child_answers():
    model, given = latent("bert", "base").pack(), inputs(batch=4)
    torch.set_num_threads(2)
    expected = answer(model, given)  # its workers exist in this process only
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        queue = context.Queue()
        child = context.Process(target=_child, args=(queue, model, given))
        child.start()
        found = queue.get(timeout=60)
        child.join(5)
        assert child.exitcode == 0
        assert torch.equal(torch.from_numpy(found), expected)
    assert torch.equal(answer(model, given), expected)


def test_nothing_is_freed_when_the_process_ends():
    """Daemon threads may be inside the engine then, and memory goes back to the system anyway."""
    model, bits = latent("bert", "base").pack(), pack_codes(torch.zeros(1, 3, 8, dtype=torch.int8), "2bit")
    weight = native.NativeWeight(bits, 8, "2bit", torch.ones(1, 3, 1), 8, None)
    answer(model, inputs())
    for free in (native.library.qb_encoder_free, native.library.qb_weight_free):
        found = [info for info in weakref.finalize._registry.values() if info.func is free]
        assert found and weight.handle and not any(info.atexit for info in found)


def test_python_threads_and_models_at_once():
    models = [latent("bert", "base", seed=seed).pack() for seed in (1, 2)]
    batches = [inputs(batch=batch, tokens=tokens) for batch, tokens in ((1, 5), (4, 12), (2, 40))]
    torch.set_num_threads(2)
    expected = [[answer(model, given) for given in batches] for model in models]
    wrong = []

    def work(seed: int) -> None:
        torch.set_num_threads(1 + seed % 3)
        for turn in range(40):
            row, column = (seed + turn) % 2, (seed * 7 + turn) % 3
            if not torch.equal(answer(models[row], batches[column]), expected[row][column]):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong


def _tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def test_threads_follow_torch():
    model, given = latent("bert", "base").pack(), inputs(batch=3, tokens=30)
    workers = {}
    for threads in (1, 4, 2, 1, 4):
        torch.set_num_threads(threads)
        torch.ones(1 << 20).exp()  # torch's own pool grows now, and is not counted
        before = _tasks()
        answer(model, given)
        workers.setdefault(threads, []).append(_tasks() - before)
    assert max(workers[1] + workers[2]) <= 0  # other tests' threads may end meanwhile
    assert workers[4][0] <= 3 and workers[4][1] <= 0


def _answer_in(folder: pathlib.Path, **environment: str) -> tuple[str, str]:
    """Prints path and a digest of the answer of a model in a process whose package is the copy in `folder`."""
    tiny = os.path.dirname(sys.modules["tiny"].__file__)
    code = f"""
import sys, hashlib, torch
sys.path[:0] = [{str(folder)!r}, {tiny!r}]
if {str(folder)!r} != {str(PACKAGE.parent)!r}:  # an editable install finds its own package first
    sys.meta_path = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
from tiny import inputs, latent
from modeling_qbert import ops, __file__ as where
assert where.startswith({str(folder)!r}), where
model = latent("bert", "base").pack()
with torch.no_grad():
    last = model(**inputs())[0]
real = inputs()["attention_mask"].bool()
engine = model._fused_engine.encoder
path = "torch" if engine is None else sys.modules["modeling_qbert.native"].level()
print(path, hashlib.sha256(last[real].numpy().tobytes()).hexdigest())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert output.returncode == 0, output.stderr
    path, digest = output.stdout.split()
    return path, digest + (" said" if output.stderr.count("plain torch") == 1 else "")


def test_without_the_library_and_with_a_foreign_one(tmp_path):
    given = inputs()
    last = answer(latent("bert", "base").pack(), given)[given["attention_mask"].bool()]
    digest = hashlib.sha256(last.numpy().tobytes()).hexdigest()
    for name in ("missing", "foreign"):
        folder = tmp_path / name
        shutil.copytree(PACKAGE, folder / "modeling_qbert", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        if name == "foreign":
            shutil.copy(torch._C.__file__, folder / "modeling_qbert" / "_engine.so")
        assert _answer_in(folder) == ("torch", digest + " said")
    assert _answer_in(PACKAGE.parent, QBERT_CPU="scalar") == ("scalar", digest)
    assert _answer_in(PACKAGE.parent, QBERT_CPU="off") == ("torch", digest + " said")


def test_a_cpu_that_the_engine_is_slow_on(monkeypatch):
    class Slow(ctypes.CDLL):
        def __getattr__(self, name):
            return (lambda: 0) if name == "qb_best_level" else super().__getattr__(name)

    monkeypatch.setattr(ctypes, "CDLL", Slow)
    monkeypatch.delenv("QBERT_CPU", raising=False)
    with pytest.raises(ImportError, match="plain torch is faster: this CPU has none of"):
        native._load()
    monkeypatch.setenv("QBERT_CPU", "scalar")
    assert native._load().qb_version() == native.VERSION
