"""Recipes of mergekit in the shapes that model cards have, over models called base, A, B and C.

Each has four layers. What a recipe holds was written for these tests; its shape was seen in public.
"""

from __future__ import annotations

__all__ = ["CASES", "REFUSED"]

CASES = {
    "linear": """
models:
  - model: A
    parameters: {weight: 1.0}
  - model: B
    parameters: {weight: 0.3}
  - model: C
    parameters: {weight: 0.5}
merge_method: linear
""",
    "linear-sums-as-given": """
merge_method: linear
models:
  - {model: A, parameters: {weight: 0.6}}
  - {model: B, parameters: {weight: 0.6}}
parameters:
  normalize: false
""",
    "linear-one-weight-for-all": """
models: [{model: A}, {model: B}, {model: C}]
merge_method: linear
parameters:
  weight: 1
""",
    "linear-gradient": """
models:
  - model: A
    parameters:
      weight: [0, 0.3, 0.7, 1]
  - model: B
    parameters:
      weight: [1, 0.7, 0.3, 0]
merge_method: linear
""",
    "linear-filters": """
models:
  - model: A
    parameters:
      weight:
        - filter: self_attn
          value: [0.2, 0.8]
        - filter: mlp
          value: 0.25
        - value: 0.5
  - model: B
    parameters:
      weight:
        - filter: lm_head
          value: 1
        - value: 0.5
merge_method: linear
""",
    "linear-with-a-base-as-input": """
merge_method: linear
base_model: base
models:
  - model: base
    parameters: {weight: 0.5}
  - model: A
    parameters: {weight: 0.5}
""",
    "linear-with-a-base-added": """
merge_method: linear
base_model: base
models:
  - model: A
  - model: B
parameters: {weight: 0.25}
""",
    "linear-slices": """
merge_method: linear
slices:
  - sources:
      - model: A
        layer_range: [0, 2]
        parameters: {weight: 0.25}
      - model: B
        layer_range: [0, 2]
        parameters: {weight: 0.75}
  - sources:
      - model: B
        layer_range: [2, 4]
        parameters: {weight: 0.5}
      - model: C
        layer_range: [2, 4]
        parameters: {weight: 0.5}
""",
    "linear-of-other-layers": """
merge_method: linear
slices:
  - sources:
      - {model: A, layer_range: [0, 3], parameters: {weight: [0.9, 0.1]}}
      - {model: B, layer_range: [1, 4], parameters: {weight: 0.5}}
""",
    "slerp": """
models:
  - model: A
  - model: B
merge_method: slerp
base_model: A
parameters:
  t: 0.5
""",
    "slerp-card": """
slices:
  - sources:
      - model: A
        layer_range: [0, 4]
      - model: B
        layer_range: [0, 4]
merge_method: slerp
base_model: A
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
""",
    "slerp-other-first": """
slices:
- sources:
  - layer_range: [0, 4]
    model: A
  - layer_range: [0, 4]
    model: B
base_model: B
merge_method: slerp
parameters:
  t: 0.3
""",
    "slerp-base-left-out": """
models:
  - model: B
base_model: A
merge_method: slerp
parameters:
  t: [0.1, 0.9]
""",
    "slerp-two-slices": """
slices:
  - sources:
      - {model: A, layer_range: [0, 2]}
      - {model: B, layer_range: [0, 2]}
    parameters: {t: 0.2}
  - sources:
      - {model: A, layer_range: [2, 4]}
      - {model: B, layer_range: [2, 4]}
merge_method: slerp
base_model: A
parameters:
  t: [0.6, 0.8]
""",
    "slerp-own-base": """
slices:
  - sources:
      - {model: A, layer_range: [0, 2]}
      - {model: B, layer_range: [0, 2]}
    base_model: B
  - sources:
      - {model: A, layer_range: [2, 4]}
      - {model: C, layer_range: [2, 4]}
merge_method: slerp
base_model: A
parameters: {t: 0.25}
""",
    "nuslerp": """
models:
  - model: A
    parameters: {weight: 0.4}
  - model: B
    parameters: {weight: 0.6}
merge_method: nuslerp
""",
    "nuslerp-task-vectors": """
models:
  - model: A
    parameters:
      weight: [0, 1]
  - model: B
    parameters:
      weight: [1, 0.5]
merge_method: nuslerp
base_model: base
""",
    "multislerp": """
models:
  - {model: A, parameters: {weight: 0.5}}
  - {model: B, parameters: {weight: 0.3}}
  - {model: C, parameters: {weight: 0.2}}
merge_method: multislerp
""",
    "multislerp-task-vectors": """
models:
  - model: A
  - model: B
base_model: base
merge_method: multislerp
parameters:
  weight: 1.0
  eps: 1e-8
""",
    "karcher": """
models:
  - model: A
  - model: B
  - model: C
merge_method: karcher
parameters:
  max_iter: 1000
  tol: 1e-9
""",
    "task-arithmetic": """
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: A
    parameters:
      weight: 1.0
""",
    "task-arithmetic-lambda": """
models:
  - model: A
    parameters: {weight: 0.35}
  - model: B
    parameters: {weight: -0.5}
merge_method: task_arithmetic
base_model: base
parameters:
  lambda: 0.8
  normalize: false
""",
    "task-arithmetic-normalize": """
models:
  - {model: A, parameters: {weight: 1}}
  - {model: B, parameters: {weight: [3, 1]}}
merge_method: task_arithmetic
base_model: base
parameters:
  normalize: true
""",
    "ties": """
models:
  - model: base
    # no parameters necessary for base model
  - model: A
    parameters:
      density: 0.5
      weight: 0.5
  - model: B
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
""",
    "ties-gradients": """
models:
  - model: A
    parameters:
      density: [1, 0.7, 0.1] # gradient
      weight: 1.0
  - model: B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # gradient
  - model: C
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
""",
    "ties-card": """
models:
  - model: A
    parameters: {weight: 0.6, density: 0.4}
  - model: B
    parameters: {weight: 0.4, density: 0.4}
merge_method: ties
base_model: base
parameters:
  normalize: false
  lambda: 1.1
""",
    "ties-slices": """
slices:
- sources:
  - layer_range: [0, 4]
    model: base
  - layer_range: [0, 4]
    model: A
    parameters: {weight: 0.5, density: 0.6}
  - layer_range: [0, 4]
    model: B
    parameters: {weight: 0.5, density: 0.6}
merge_method: ties
base_model: base
parameters:
  lambda: 0.5676
  normalize: 1.0
""",
    "ties-modules": """
merge_method: ties
base_model: base
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 4]
        model: A
        parameters:
          density: 0.5
          weight: [0.9, 0.2, 0.2, 0.95, 0.2]
      - layer_range: [0, 4]
        model: base
""",
    "ties-all-kept": """
models:
  - {model: A, parameters: {weight: 0.5}}
  - {model: B, parameters: {weight: 0.5}}
merge_method: ties
base_model: base
""",
    "dare-ties": """
models:
  - model: base
  - model: A
    parameters:
      density: 0.53
      weight: 0.4
  - model: B
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: base
parameters:
  int8_mask: true
""",
    "dare-linear-whole": """
models:
  - model: "A"
    parameters:
      weight: 1.0
      density: 1.0
  - model: "B"
    parameters:
      weight: 0.8
      density: 1.0
base_model: "base"
merge_method: dare_linear
parameters:
  lambda: 1.0
  rescale: false
""",
    "dare-linear-zero": """
models:
  - {model: A, parameters: {weight: 1.0, density: 0}}
  - {model: B, parameters: {weight: 0.8, density: 1}}
base_model: base
merge_method: dare_linear
""",
    "dare-ties-whole": """
merge_method: dare_ties
base_model: base
parameters:
  density: 1
  weight: 1.0
models:
  - model: A
  - model: B
  - model: C
""",
    "dare-linear": """
models:
  - {model: A, parameters: {weight: 0.5, density: 0.3}}
  - {model: B, parameters: {weight: 0.5, density: 0.7}}
base_model: base
merge_method: dare_linear
""",
    "breadcrumbs": """
models:
  - model: A
    parameters: {weight: 0.7, density: 0.9, gamma: 0.01}
  - model: B
    parameters: {weight: 0.3, density: 0.9, gamma: 0.05}
merge_method: breadcrumbs
base_model: base
""",
    "breadcrumbs-ties": """
models:
  - model: A
  - model: B
merge_method: breadcrumbs_ties
base_model: base
parameters:
  weight: 1
  density: [0.9, 0.6]
  gamma: 0.02
  normalize: true
""",
    "della": """
base_model: base
merge_method: della
models:
  - model: A
    parameters: {weight: 0.5}
  - model: B
    parameters: {weight: 0.5}
parameters:
  density: 0.5
  normalize: true
  epsilon: 0.4
  lambda: 1
""",
    "della-linear": """
models:
  - model: A
    parameters:
      weight:
        - filter: self_attn
          value: 0.2
        - filter: mlp
          value: 0.35
        - value: 0.3
      density: 0.75
  - model: B
    parameters:
      weight: [0.1, 0.9, 1.0]
      density: 0.6
merge_method: della_linear
base_model: base
parameters:
  normalize: true
  int8_mask: true
  epsilon: 0.05
  lambda: 1
""",
    "model-stock": """
models:
  - model: A
  - model: B
  - model: C
merge_method: model_stock
base_model: base
""",
    "model-stock-card": """
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: A
        layer_range: [0, 4]
      - model: B
        layer_range: [0, 4]
merge_method: model_stock
base_model: base
""",
    "sce": """
models:
  - model: A
  - model: B
  - model: C
merge_method: sce
base_model: base
parameters:
  select_topk: 0.15
""",
    "sce-gradient": """
models:
  - model: A
  - model: B
merge_method: sce
base_model: base
parameters:
  select_topk: [0.1, 1.0]
""",
    "ram": """
models:
  - model: A
  - model: B
merge_method: ram
base_model: base
parameters:
  epsilon: 0.002
""",
    "nearswap": """
models:
  - model: A
base_model: base
merge_method: nearswap
parameters:
  t: 0.001
""",
    "nearswap-gradient": """
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: A
        layer_range: [0, 4]
merge_method: nearswap
base_model: base
parameters:
  t:
    - filter: mlp
      value: [0.0001, 0.01]
    - value: 0.002
""",
    "passthrough": """
models:
  - model: A
merge_method: passthrough
""",
    "passthrough-scaled": """
models:
  - model: A
    parameters:
      scale:
        - filter: down_proj
          value: 0.5
        - value: 1.0
merge_method: passthrough
""",
    "frankenmerge": """
slices:
  - sources:
    - model: A
      layer_range: [0, 4]
  - sources:
    - model: B
      layer_range: [2, 4]
merge_method: passthrough
""",
    "frankenmerge-overlapping": """
merge_method: passthrough
slices:
- sources:
  - layer_range: [0, 2]
    model: A
- sources:
  - layer_range: [1, 3]
    model: A
- sources:
  - layer_range: [2, 4]
    model: A
""",
    "frankenmerge-of-three": """
merge_method: passthrough
slices:
  - sources: [{model: A, layer_range: [0, 1]}]
  - sources: [{model: B, layer_range: [1, 3]}]
  - sources: [{model: C, layer_range: [3, 4]}]
""",
    "block-expansion": """
slices:
  - sources:
    - model: A
      layer_range: [0, 2]
  - sources:
    - model: A
      layer_range: [1, 2]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
  - sources:
    - model: A
      layer_range: [2, 4]
merge_method: passthrough
""",
}
"""By name; without a dtype, which those who use them add."""

REFUSED = {
    "tokenizer_source: union": r":\d+: tokenizer_source: a union of vocabularies",
    "tokenizer: {source: union}": r":\d+: source: a union of vocabularies",
    "tokenizer: {source: base, pad_to_multiple_of: 8}": r"pad_to_multiple_of: vocabularies are not",
    "tokenizer_source: C": r"tokenizer_source: the tokenizer is that of A, .* which differs",
    "tokenizer_source: base": r"tokenizer_source: there is no base_model",
    "chat_template: chatml": r"chat_template: templates are taken from a model",
    "dtype: int8": r"dtype: 'int8' is no dtype that is averaged in",
    "experts: []": r"experts: mixtures of experts are not built here; use mergekit-moe",
    "slices: [{}]": r"names both models and slices",
    "merge_method: lerp": r"merge_method: 'lerp' is no method; did you mean slerp\?",
    "merge_method: arcee_fusion": r"merge_method: arcee_fusion is not made here",
    "merge_method: ties": r"ties needs a base_model",
    "merge_method: slerp\nbase_model: A": r"slerp needs a t, and has none for",
    "merge_method: passthrough": r"passthrough takes 1, got 2 models",
    "parameters: {weight: x}": r": weight: expected a number, got 'x'",
    "parameters: {weight: 1, normalize: maybe}": r": normalize: expected a switch, got 'maybe'",
    "parameters: {weight: 0}": r"the weights of .* sum to 0",
    "parameters: {weight: [1, {value: 2}]}": r": weight: expected a value with or without a filter",
    "parameters: {weight: [{filter: mlp, value: 1}]}": r"linear needs a weight of A, and has none",
    "parameters: 3": r": parameters: expected keys with values, got '3'",
    "base_model: [A]": r": base_model: expected one word, got a list",
}
"""Lines for a linear merge of A and B, which replace its own keys, and what they lead to."""
