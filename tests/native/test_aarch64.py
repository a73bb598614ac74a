"""The engine compiles for aarch64, and where an emulator is found it answers there as here, bit for bit."""

import pathlib
import shutil
import subprocess

import pytest

from modeling_qbert import native


HERE = pathlib.Path(__file__).resolve().parent
SOURCES = sorted((HERE.parents[1] / "native").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def build(compiler: str, target: pathlib.Path, *parts: object) -> pathlib.Path:
    subprocess.run([compiler, *FLAGS, HERE / "cross.cpp", *parts, "-o", target], check=True)
    return target


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} here")
def test_aarch64_compiles_and_answers_alike(tmp_path):
    there = build(COMPILER, tmp_path / "there", "-static", *SOURCES)
    if shutil.which(EMULATOR) is None or shutil.which("g++") is None:
        pytest.skip(f"it compiles; no {EMULATOR} or g++ here to compare what it answers")
    here = build("g++", tmp_path / "here", native.library._name)
    expected = subprocess.run([here, "0"], capture_output=True, text=True, check=True).stdout
    assert len(expected.splitlines()) == 4 * 40 + 3 * 4 + 3
    for level in ("0", "1"):  # plain loops, byte dot products
        found = subprocess.run([EMULATOR, "-cpu", "max", there, level], capture_output=True, text=True, check=True)
        assert found.stdout == expected, level
    old = subprocess.run([EMULATOR, "-cpu", "cortex-a72", there, "1"], capture_output=True)  # has none
    assert old.returncode == 2
