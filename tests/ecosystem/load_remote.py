"""Script: open saved models with `trust_remote_code=True` and write down what they answer.

Arguments: "hidden" or "installed" (whether the package may be imported), then JSON of [[auto class, folder, tensors,
answer], ...]: `tensors` is a safetensors file of inputs, `answer` the one to write. A folder with a tokenizer is also
saved again and opened by a pipeline.
"""

import json
import os
import sys


state, jobs = sys.argv[1], json.loads(sys.argv[2])
if state == "hidden":
    sys.modules["modeling_qbert"] = sys.modules["trainers"] = None  # importing either is a ModuleNotFoundError
else:
    import modeling_qbert  # noqa: F401

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


torch.set_num_threads(1)
for auto_class, folder, tensors, answer in jobs:
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**load_file(tensors), return_dict=True).to_tuple()
    save_file({str(index): part.contiguous() for index, part in enumerate(outputs)}, answer)
    print(json.dumps([type(model).__module__, type(model.config).__module__, type(model).__name__]))
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        model.save_pretrained(answer + "-again")
        classify = transformers.pipeline("text-classification", model=folder, trust_remote_code=True)
        print(json.dumps(classify("a gripping, funny film")[0]))
