"""Who may import whom (ARCHITECTURE.md)."""

import ast
from pathlib import Path

import modeling_qbert


MODELING = Path(modeling_qbert.__file__).parent
ROOT = MODELING.parent
ORDER = [
    {"quantizers", "packing", "memory"},
    {"native"},
    {"native_ops", "native_training"},
    {"ops"},
    {"checkpoint", "layers"},
    {"attention", "configuration_qbert", "integration", "lora", "lora_layer", "ghost", "fused"},
    {"modeling_lowbit"},
    {"onnx_export", "remote", "report"} | {path.stem for path in MODELING.glob("modeling_*.py")} - {"modeling_lowbit"},
    {"__init__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imports(path):
    """(level, module, names) of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def test_every_file_has_its_place():
    assert {path.stem for path in MODELING.glob("*.py")} == set(RANK)
    assert not [path for path in MODELING.iterdir() if path.is_dir() and path.name != "__pycache__"]  # flat: see below


def test_siblings_are_imported_by_name_and_in_order():
    """`from .name import thing`: the only form that `trust_remote_code` finds and copies."""
    seen = 0
    for path in MODELING.glob("*.py"):
        for level, module, names in imports(path):
            if level == 0:
                assert module.split(".")[0] not in ("modeling_qbert", "trainers"), (path.name, module)
                continue
            if path.stem == "__init__" and not module:  # never copied
                continue
            assert level == 1 and module in RANK, (path.name, module, names)
            assert RANK[module] < RANK[path.stem] or {module, path.stem} <= ORDER[5], (path.name, module)
            seen += 1
    assert seen > 20


def test_no_name_is_imported_for_a_circle():
    """Files of one rank may meet, but never in a circle."""
    uses = {path.stem: {m for level, m, _ in imports(path) if level and m} for path in MODELING.glob("*.py")}
    done = set()
    while len(done) < len(uses):
        free = {name for name, needs in uses.items() if needs <= done} - done
        assert free, f"circle among {sorted(set(uses) - done)}"
        done |= free


def test_trainers_use_public_names_only():
    public, seen = set(modeling_qbert.__all__), 0
    for path in sorted((ROOT / "trainers").rglob("*.py")):
        for level, module, names in imports(path):
            if level or module.split(".")[0] != "modeling_qbert":
                continue
            assert module == "modeling_qbert", (path.name, module)
            assert set(names) <= public, (path.name, set(names) - public)
            seen += 1
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "modeling_qbert":
                assert node.attr in public, (path.name, node.attr)
    assert seen


def test_public_names_exist():
    assert len(set(modeling_qbert.__all__)) == len(modeling_qbert.__all__)
    for name in modeling_qbert.__all__:
        assert getattr(modeling_qbert, name).__doc__ or name.startswith(("Ternary", "Binary", "Ghost")), name


def test_no_pickle():
    for path in MODELING.glob("*.py"):
        for _, module, _ in imports(path):
            assert module.split(".")[0] not in ("pickle", "joblib", "dill", "marshal", "shelve"), path.name
        assert "torch.load" not in path.read_text()
