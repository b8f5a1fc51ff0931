"""fusion_bench's `simple_average` of state dicts."""

from __future__ import annotations

from files import arguments, load, save
from fusion_bench.method.simple_average import simple_average

output, ingredients = arguments()
save(dict(simple_average([load(folder) for folder in ingredients])), output)
