"""A small network that reads digits, and its files.

Three convolutions and two linear layers, about 107,000 parameters.  It has a LayerNorm and no
BatchNorm, whose running statistics would have to be measured anew for every average.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from streamsoup.demo.digits import SIDE
from streamsoup.errors import OutputError, printable
from streamsoup.study.pages.page import write_text

N_CLASSES = 10


class Network(nn.Module):
    """Images `(image, 1, row, column) float32` in, logits `(image, class) float32` out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1, stride=2)
        self.norm = nn.LayerNorm(64 * (SIDE // 4) ** 2)
        self.hidden = nn.Linear(64 * (SIDE // 4) ** 2, 64)
        self.head = nn.Linear(64, N_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = 2 * images - 1
        for conv in (self.conv1, self.conv2, self.conv3):
            x = functional.relu(conv(x))
        x = self.norm(x.flatten(1))
        x = functional.relu(self.hidden(x))
        logits: Tensor = self.head(x)
        return logits


def build(seed: int) -> Network:
    """Return a network with random weights, the same for the same `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()


def save(network: Network, folder: Path) -> Path:
    """Write `folder/model.safetensors` and `folder/config.json`; return `folder`.

    Raises `OutputError` if the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    try:
        save_file(network.state_dict(), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"{printable(path)}: cannot be written: {printable(error)}") from None
    config = {"model_type": "streamsoup-demo", "image_size": SIDE, "num_labels": N_CLASSES}
    write_text(str(folder / "config.json"), json.dumps(config, indent=2) + "\n")
    return folder


def load(folder: Path) -> Network:
    """Return the network that `save`, or an average of saved networks, wrote to `folder`."""
    network = build(seed=0)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network


@torch.inference_mode()
def predict(network: Network, images: Tensor) -> Tensor:
    """Return the logits `(image, class) float32`, with the network in evaluation mode."""
    network.eval()
    logits: Tensor = network(images)
    return logits
