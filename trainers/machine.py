"""What this machine is and how training makes the most of it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
KEPT_SHARE = 0.5  # of the machine's memory; beyond, freed memory is given back


def cpu_name() -> str:
    """Model name of the processor; where Linux tells, with family and model: names of virtual ones are vague."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    numbers = [f"{key.split()[-1]} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return fields["model name"] + (f" ({', '.join(numbers)})" if numbers else "")


def bfloat16_is_fast() -> bool:
    """Whether products in bfloat16 are computed as such here. Elsewhere they are ten times slower than in fp32 (CPUs
    without AVX-512 or AMX) or emulated (GPUs before Ampere)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def memory_limit() -> int:
    """Bytes that all of this machine's processes, or those of this container, may hold."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # version 2, version 1
        try:
            limit = min(limit, int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            pass
    return limit


@contextmanager
def freed_memory_kept() -> Iterator[Callable[[], None]]:
    """Freed memory stays with this process until the end, then it goes back to the system.

    Left alone, glibc returns every large tensor when it is freed and gets zeroed pages for the next one, all through
    every step: 8 to 34 % of its time (benchmarks/training_step.py). Other systems' allocators are left as they are.

    Yields:
        To be called after a step: gives back what is free if the process holds more than `KEPT_SHARE` of all memory.
        Steps of different lengths leave gaps that the next ones do not fit into.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)  # musl has none
    if mallopt is None:
        yield lambda: None
        return
    page, most = os.sysconf("SC_PAGE_SIZE"), KEPT_SHARE * memory_limit()

    def give_back() -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        if resident > most:
            libc.malloc_trim(0)

    if not mallopt(M_MMAP_THRESHOLD, 2**31 - 1):  # older versions take 32 MiB at most
        mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield give_back
    finally:
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that glibc itself arrives at, and twice that
        mallopt(M_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)
