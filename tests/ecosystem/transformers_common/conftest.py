"""Writes what Transformers' own tests came to into COUNTS.md: a row for each class that ran, the others stay."""

from collections import Counter
from pathlib import Path

import transformers


COUNTS = Path(__file__).with_name("COUNTS.md")
OUTCOMES = ("passed", "failed", "skipped")
HEAD = (
    "Transformers' own model tests, by `make hf-tests`, which writes this file. Reasons of skips: `-rs`, and `SKIPS` "
    "in common.py; most are for what an encoder lacks (RoPE, experts, generation) or a machine (accelerators).\n\n"
    "| family, backbone, state | passed | failed | skipped | transformers |\n|---|---|---|---|---|\n"
)


def pytest_terminal_summary(terminalreporter):
    counts: dict[str, Counter] = {}
    for outcome in (*OUTCOMES, "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            file, _, test = report.nodeid.partition("::")
            if not file.endswith("transformers_common/common.py"):
                continue  # pytest calls this in every run that collects here
            kind = test.partition("::")[0] or "collection"
            counts.setdefault(kind, Counter())["failed" if outcome == "error" else outcome] += 1
    if not counts:
        return
    rows = {}
    if COUNTS.exists():
        lines = COUNTS.read_text().splitlines()
        rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ") and "Test" in line}
    for kind, found in counts.items():
        numbers = " | ".join(str(found[outcome]) for outcome in OUTCOMES)
        rows[kind] = f"| {kind} | {numbers} | {transformers.__version__} |"
    COUNTS.write_text(HEAD + "\n".join(rows[kind] for kind in sorted(rows)) + "\n")
