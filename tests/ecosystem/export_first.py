"""Script: torch.export is the first thing that ever runs a packed model in this process; answers must survive it.

Prints how many products of the native engine the exported graph holds.
"""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "modeling")]

import torch  # noqa: E402
from tiny import inputs  # noqa: E402
from zoo import build  # noqa: E402


torch.set_num_threads(1)
model, given = build("ternary", "bert", state="packed", num_hidden_layers=1), inputs()
sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=38)}
with torch.no_grad():
    exported = torch.export.export(model, (), given, dynamic_shapes=dict.fromkeys(given, sizes))
    program = exported.module()
    for other in (given, inputs(batch=5, tokens=17)):
        assert torch.equal(program(**other).logits, model(**other).logits)
print(sum("qbert.packed_linear" in str(node.target) for node in exported.graph.nodes))
