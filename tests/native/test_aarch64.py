"""The engine compiles for aarch64, and where an emulator is found it answers there as here, bit for bit."""

import pathlib
import shutil
import subprocess

import pytest

from modeling_qbert import native


HERE = pathlib.Path(__file__).resolve().parent
SOURCES = sorted((HERE.parents[1] / "native").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
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
    here = build("g++", tmp_path / "here", native._library._name)
    found = subprocess.run([EMULATOR, there], capture_output=True, text=True, check=True).stdout
    expected = subprocess.run([here], capture_output=True, text=True, check=True).stdout
    assert found == expected and len(found.splitlines()) == 4 * 40 + 3 * 4 + 3
