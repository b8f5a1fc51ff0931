"""mergekit by its own command line, given its flags: ``mergekit_merge OUT INGREDIENT…``.

``$MERGEKIT`` says how: ``default``, ``float32`` (work in float32, write the ingredients' dtype),
or ``best``: the same with all flags that make reading and writing faster on a CPU.
``$MERGEKIT_METHOD`` says what: ``linear``, or a method over task vectors with density 0.5, whose
base is the first ingredient.
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
method = os.environ.get("MERGEKIT_METHOD", "linear")
recipe = {
    "merge_method": method,
    "dtype": stored if how == "default" else "float32",
    "out_dtype": stored,
}
parameters = {"weight": 1.0}
if method != "linear":
    recipe["base_model"], *ingredients = ingredients
    parameters["density"] = 0.5
recipe["models"] = [{"model": folder, "parameters": parameters} for folder in ingredients]
flags = ["--no-copy-tokenizer", "--quiet"]
if how == "best":
    flags += ["--lazy-unpickle", "--async-write", "--write-threads", "2"]
    flags += ["--no-write-model-card", "--num-threads", str(os.cpu_count())]
with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
    json.dump(recipe, file)
    file.flush()
    main([file.name, output, *flags])
