"""README's tables are what `qbert table` makes of the committed results."""

from pathlib import Path

import pytest

from trainers import cli
from trainers.results import load_results
from trainers.tables import render_zoo, update_tables


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_tables_are_rendered_from_the_results(name):
    path = ROOT / name
    text = path.read_text()
    assert update_tables(text, path.parent) == text, f"render them again: qbert table --update {name}"


def test_update_replaces_blocks_alone(tmp_path, capsys):
    (tmp_path / "results").symlink_to(ROOT / "results")
    path, second = tmp_path / "README.md", tmp_path / "second.md"
    path.write_text("before\n<!-- qbert table results/ternarybert-glue -->\n| old |\n<!-- end -->\nafter\n")
    second.write_text(path.read_text())
    assert cli.main(["table", "--update", str(path), str(second)]) == 0
    text = path.read_text()
    assert second.read_text() == text
    assert text.startswith("before\n<!-- qbert") and text.endswith("<!-- end -->\nafter\n")
    assert "| old |" not in text and "SST-2 (accuracy)" in text
    assert update_tables(text, tmp_path) == text and not capsys.readouterr().out
    with pytest.raises(ValueError, match="found none"):
        update_tables("no block", tmp_path)
    assert cli.main(["table", "results", "--update", str(path), "--figure", "new.png"]) == 2
    assert "--update: expected nothing beside it, found results, figure" in capsys.readouterr().err


def test_zoo_lists_every_checkpoint():
    table = render_zoo(ROOT / "model_cards")
    folders = [path.parent for path in (ROOT / "model_cards").glob("*/model.safetensors")]
    assert len(table.splitlines()) == 2 + len(folders)
    for folder in folders:
        line = next(line for line in table.splitlines() if f"(model_cards/{folder.name})" in line)
        assert f"{(folder / 'model.safetensors').stat().st_size / 1e6:.2f} MB" in line


def test_packed_models_score_what_training_measured():
    """In every committed result: not a logit and not a score changed when the student was packed."""
    results = load_results([ROOT / "results"]) + load_results([ROOT / "model_cards"])
    assert len(results) > 100
    for run in results:
        assert run["packed"]["max_logit_difference"] == 0 and run["packed"]["metrics"] == run["student"]["metrics"], (
            run
        )
