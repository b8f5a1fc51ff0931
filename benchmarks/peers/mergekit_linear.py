"""mergekit's linear merge by its own command line, given its flags: ``mergekit_linear OUT …``.

``$MERGEKIT`` says how: ``default``, ``float32`` (work in float32, write the ingredients' dtype),
or ``best``: the same with all flags that make reading and writing faster on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

from mergekit.scripts.run_yaml import main

output, *ingredients = sys.argv[1:]
with open(os.path.join(ingredients[0], "config.json"), encoding="utf-8") as file:
    stored = json.load(file)["torch_dtype"]
how = os.environ["MERGEKIT"]
recipe = {
    "merge_method": "linear",
    "models": [{"model": folder, "parameters": {"weight": 1.0}} for folder in ingredients],
    "dtype": stored if how == "default" else "float32",
    "out_dtype": stored,
}
flags = ["--no-copy-tokenizer", "--quiet"]
if how == "best":
    flags += ["--lazy-unpickle", "--async-write", "--write-threads", "2"]
    flags += ["--no-write-model-card", "--num-threads", str(os.cpu_count())]
with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
    json.dump(recipe, file)
    file.flush()
    main([file.name, output, *flags])
