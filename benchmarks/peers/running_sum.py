"""The paper's loop: one model after the other times 1/N, added up in the dtype of storage.

After model-soups `main.py`, step 3 (https://github.com/mlfoundations/model-soups, 2022), in our
words; it reads `.pt` files, here safetensors.
"""

from __future__ import annotations

from files import arguments, load, save

output, ingredients = arguments()
share = 1.0 / len(ingredients)
soup = {name: tensor * share for name, tensor in load(ingredients[0]).items()}
for folder in ingredients[1:]:
    soup = {name: tensor * share + soup[name] for name, tensor in load(folder).items()}
save(soup, output)
