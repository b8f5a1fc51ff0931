"""What to type to make safetensors of checkpoints that are stored in other ways.

Each is a line for a shell, with the paths filled in, of the library that wrote the checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

__all__ = ["of_hub_id", "of_pickle", "of_torchscript", "of_training_folder"]

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?", re.ASCII)
_FILE = re.compile(r"\.(safetensors|json|bin|pth?|ckpt|pkl|gguf|txt|ya?ml|py|npz|h5)$")


def of_pickle(path: str) -> str:
    """Return the line that makes safetensors of a PyTorch pickle, without running its code."""
    made = f"{os.path.splitext(path)[0]}.safetensors"
    script = (
        "import sys, torch; from safetensors.torch import save_file; "
        "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "d = d.get('state_dict', d.get('model', d)); "
        "save_file({k: v.clone().contiguous() for k, v in d.items()}, sys.argv[2], "
        "{'format': 'pt'})"
    )
    return f'python -c "{script}" {shlex.quote(path)} {shlex.quote(made)}'


def of_torchscript(path: str) -> str:
    """Return the line that saves the state dict of a TorchScript archive, whose code it loads."""
    made = f"{os.path.splitext(path)[0]}-weights.pt"
    script = (
        "import sys, torch; "
        "torch.save(torch.jit.load(sys.argv[1], 'cpu').state_dict(), sys.argv[2])"
    )
    return f'python -c "{script}" {shlex.quote(path)} {shlex.quote(made)}'


def of_training_folder(folder: str, names: Sequence[str]) -> str | None:
    """Return the line that makes a checkpoint of a DeepSpeed, FSDP or DCP folder, if it is one.

    `names` are those of the files and folders in it.
    """
    whole, made = shlex.quote(folder), shlex.quote(f"{folder.rstrip('/')}-whole")
    inside = [
        each for name in names if name.startswith("global_step") for each in _names(folder, name)
    ]
    deepspeed = ("mp_rank_", "zero_pp_rank_", "bf16_zero_pp_rank_")
    if "zero_to_fp32.py" in names or any(name.startswith(deepspeed) for name in [*names, *inside]):
        script = "zero_to_fp32.py" if folder == os.curdir else f"{folder}/zero_to_fp32.py"
        return f"python {shlex.quote(script)} {whole} {made} --safe_serialization"
    for name in names:
        if name.startswith("pytorch_model_fsdp") and os.path.isdir(os.path.join(folder, name)):
            inner = shlex.quote(os.path.join(folder, name))
            return f"accelerate merge-weights {inner} {made}"
    if any(name.endswith(".distcp") for name in names):
        pickle = f"{folder.rstrip('/')}.pt"
        first = (
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {whole} "
            f"{shlex.quote(pickle)}"
        )
        return f"{first} && {of_pickle(pickle)}"
    return None


def _names(folder: str, name: str) -> list[str]:
    try:
        return os.listdir(os.path.join(folder, name))
    except OSError:
        return []


def of_hub_id(given: str) -> str | None:
    """Return the line that downloads a model of the Hugging Face Hub, if `given` may name one.

    >>> of_hub_id("org/model@v1"), of_hub_id("gpt2")
    ('hf download org/model --revision v1', 'hf download gpt2 --local-dir gpt2')
    """
    if not _HUB_ID.fullmatch(given) or _FILE.search(given):
        return None
    name, _, revision = given.partition("@")
    told = f" --revision {revision}" if revision else ""
    kept = "" if "/" in name else f" --local-dir {name}"  # else found in the Hub's cache, by its id
    return f"hf download {name}{told}{kept}"
