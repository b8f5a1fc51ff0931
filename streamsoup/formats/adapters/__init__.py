"""LoRA adapters of PEFT, read over the base they were trained on: ``BASE+ADAPTER``.

* `paths` tells such a path from one that merely has a plus sign.
* `config` reads ``adapter_config.json``, and refuses by name what is no plain LoRA.
* `adapter` sorts the tensors of an adapter into pairs of factors and whole tensors.
* `terms` finds what each pair adds to which tensor of the base.
* `source` is the derived source that delivers W + s·B·A in float64.
* `joining` makes one adapter of adapters without a base; `joined` is the source of each of them.

The formula is that of Hu et al. 2021, https://arxiv.org/abs/2106.09685; with ``use_rslora`` that of
Kalajdzievski 2023, https://arxiv.org/abs/2312.03732. The files are those of PEFT 0.21
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""
