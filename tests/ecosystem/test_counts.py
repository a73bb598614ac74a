"""What Transformers' own tests came to is written by their run alone: `make test` must not touch a tracked file."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace


CONFTEST = Path(__file__).with_name("transformers_common") / "conftest.py"
COMMON = "tests/ecosystem/transformers_common/common.py"


def write_counts(monkeypatch, file, **outcomes):
    specification = importlib.util.spec_from_file_location("counts_conftest", CONFTEST)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "COUNTS", file)
    stats = {outcome: [SimpleNamespace(nodeid=name) for name in names] for outcome, names in outcomes.items()}
    module.pytest_terminal_summary(SimpleNamespace(stats=stats))


def test_other_tests_are_not_counted(monkeypatch, tmp_path):
    file = tmp_path / "COUNTS.md"
    write_counts(
        monkeypatch, file, passed=["tests/test_readme.py::test_tables"], skipped=["tests/native/test_x.py::test_y"]
    )
    assert not file.exists()


def test_rows_of_classes_that_did_not_run_stay(monkeypatch, tmp_path):
    file = tmp_path / "COUNTS.md"
    write_counts(monkeypatch, file, passed=[f"{COMMON}::ATest::test_one", "tests/test_readme.py::test_tables"])
    write_counts(monkeypatch, file, passed=[f"{COMMON}::BTest::test_one"], error=[f"{COMMON}::BTest::test_two"])
    rows = [line.split(" | ")[:4] for line in file.read_text().splitlines() if "Test" in line]
    assert rows == [["| ATest", "1", "0", "0"], ["| BTest", "1", "1", "0"]]
