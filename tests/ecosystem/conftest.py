"""Helpers shared by the tests of what other libraries do with a low-bit model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRAINED = ROOT / "model_cards" / "ternarybert-minilm-sst2"

sys.path.insert(0, str(HERE.parent / "modeling"))  # tiny: the small random models of those tests


@pytest.fixture
def trained() -> Path:
    """Folder of a packed MiniLM classifier with trained weights; read-only."""
    return TRAINED


@pytest.fixture
def fresh_process(tmp_path):
    """Runs a script of this folder in a new interpreter with its own module cache: (name, arguments) -> stdout."""

    def run(script: str, *arguments: object, **environment: str) -> str:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        done = subprocess.run(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
