"""Script: a LoRA adapter on a packed model, with peft imported first if asked to, otherwise last."""

import pickle
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "modeling")]
if sys.argv[1:]:
    import peft  # noqa: F401

import torch  # noqa: E402
from tiny import inputs  # noqa: E402
from zoo import build  # noqa: E402


torch.set_num_threads(1)
model, given = build("ternary", "bert", state="packed"), inputs()
with torch.no_grad():
    expected = model(**given).logits
assert bool(sys.argv[1:]) == any(name.partition(".")[0] == "peft" for name in sys.modules)

from peft import LoraConfig, get_peft_model  # noqa: E402


tuned = get_peft_model(model, LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
names = {type(module).__name__ for module in tuned.modules()}
assert "LoraQuantizedLinear" in names, names
with torch.no_grad():
    found = tuned(**given).logits
    assert not torch.equal(found, expected)
    assert torch.equal(pickle.loads(pickle.dumps(tuned))(**given).logits, found)
