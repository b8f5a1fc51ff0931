"""The documentation's commands run as they stand, in a folder that has what they name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import factors, save_adapter
from checkpoints import save, tensor
from pipelines import diffusers, sentences
from test_docs import ALL, DOCS, blocks
from test_readme import README
from test_readme import commands as commands_of_readme
from torch.distributed import checkpoint as distributed

from streamsoup.cli import cli
from streamsoup.cli.contents import COMMANDS

NOT_RUN = {
    "--device cuda": "needs a GPU",
    "--server": "needs an inference server; stubs are in test_servers.py",
    "--ray": "needs Ray; test_ray.py",
    "org/run1": "needs the Hub; a local one in test_hub.py and test_remote.py",
    "https://host": "needs a server; test_remote.py",
    "hf://org": "needs the Hub; test_remote.py",
    "s3://bucket": "needs a store; test_stores.py and test_stores_moto.py",
    "streamsoup watch": "goes on until it is stopped; test_watch.py",
    "streamsoup demo": "takes a minute; test_demo.py",
    "streamsoup selftest": "takes as long; test_selftest.py",
}
"""What is in a command that is not run here, and why."""

MADE = ("soup", "SOUP", "learned", "report", "path", "again", "converted")
"""Outputs of the pages: their commands are alternatives, so each begins without the one before."""

TASK = """
from pathlib import Path
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
TARGET = load_file(HERE / "run1" / "model.safetensors")
splits = ["val", "test"]


def build():
    model = torch.nn.Module()
    for name, value in TARGET.items():
        *folders, last = name.split(".")
        at = model
        for folder in folders:
            if not hasattr(at, folder):
                at.add_module(folder, torch.nn.Module())
            at = getattr(at, folder)
        at.register_parameter(last, torch.nn.Parameter(torch.zeros_like(value)))
    return model


def loss(model, split):
    shift = 0.01 * (1 + splits.index(split))
    for name, value in model.named_parameters():
        yield ((value - TARGET[name] - shift) ** 2).mean()


def score(model, split):
    return -sum(float(value) for value in loss(model, split))
"""


def llama(folder: Path, seed: int, n_layers: int = 32) -> Path:
    """Save a fine-tune with the names of a language model."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "model.norm.weight": (4,),
        "lm_head.weight": (6, 4),
        "classifier.weight": (3, 4),
        "module.extra.weight": (3, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
    }
    for layer in range(n_layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (4, 4)
    tensors = {
        name: tensor((base.normal(size=s) + 0.01 * own.normal(size=s)).astype("f4"))
        for name, s in shapes.items()
    }
    save(folder, tensors)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": n_layers}))
    return folder


def training_run(folder: Path) -> None:
    """Save twelve checkpoints as the Trainer does."""
    for step in range(100, 1300, 100):
        checkpoint = llama(folder / f"checkpoint-{step}", step, 1)
        note = {"step": step, "eval_loss": abs(step - 900) / 100}
        state = {"global_step": step, "log_history": [note]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def fp8(folder: Path, seed: int) -> None:
    """Save weights in blocks of fp8."""
    codes = np.random.default_rng(seed).integers(0, 0x70, (130, 140), dtype=np.uint8)
    scales = tensor(np.ones((2, 2), np.float32))
    save(folder, {"w": ("F8_E4M3", codes.shape, codes.tobytes()), "w_scale_inv": scales})
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantised}))


def pickles() -> None:
    """Save files of torch.save, and folders of torch.distributed.checkpoint."""
    for i, name in enumerate(("run1/pytorch_model.bin", "run2/last.ckpt", "run3/model.pt")):
        state: Any = {"w": torch.full((3,), float(i))}
        torch.save({"state_dict": state} if name.endswith("ckpt") else state, name)
    for step in (1000, 2000, 3000):
        with warnings.catch_warnings(action="ignore"):  # that there is one process
            distributed.save(
                {"w": torch.full((3,), float(step))}, checkpoint_id=f"dcp/step-{step}", no_dist=True
            )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with all that pages name."""
    folder = tmp_path_factory.mktemp("world")
    names = ("base", "run1", "run2", "run3", "step1", "step2", "step3")
    for seed, name in enumerate(names):
        llama(folder / name, seed)
    for name, same in {"BASE": "base", "pretrained": "base", "A": "run1", "B": "run2"}.items():
        shutil.copytree(folder / same, folder / name)
    shutil.copytree(folder / "run3", folder / "C")
    training_run(folder / "RUN")
    shutil.copytree(folder / "RUN", folder / "run")
    for i in (1, 2):
        diffusers(folder / f"sdxl-run{i}", i)
        sentences(folder / f"embedder-run{i}", i)
        fp8(folder / f"DeepSeek-run{i}", i)
        a, b = factors(np.random.default_rng(i), 4, 4, 2)
        module = "model.layers.0.self_attn.q_proj"
        pair = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        save_adapter(folder / f"ADAPTER{i}", pair, r=2)
    (folder / "task.py").write_text(TASK)
    (folder / "eval.py").write_text("import os, sys\nprint(len(os.listdir(sys.argv[1])))\n")
    (folder / "mergekit.yml").write_text(
        "merge_method: linear\nmodels: [{model: run1, parameters: {weight: 1}}, {model: run2,"
        " parameters: {weight: .5}}]\ndtype: float32\n"
    )
    shutil.copy(folder / "mergekit.yml", folder / "mergekit_config.yml")
    (page,) = [
        block
        for block in blocks((DOCS / "reference" / "recipe-format.md").read_text(), "yaml")
        if block.startswith("# recipe.yaml")
    ]
    (folder / "recipe.yaml").write_text(page)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def line(command: str) -> int:
    """Run a command in the current folder, with its output in a file where it says so."""
    words = shlex.split(command)[1:]
    target = words[-1] if ">" in words else os.devnull
    with Path(target).open("w") as out, contextlib.redirect_stdout(out):
        return cli(words[:-2] if ">" in words else words)


def prepare(page: str, command: str) -> None:
    """Take away what an alternative made, and put there what the command follows."""
    words = shlex.split(command)
    for name in MADE if {"-o", "recipe.yaml"} & set(words) else ():
        shutil.rmtree(name, ignore_errors=True)
        if "--part" not in words or "auto" in words:
            shutil.rmtree(f"{name}.parts", ignore_errors=True)
    follows = command in ("streamsoup verify soup", "streamsoup run soup -o again")
    if (follows or "-c soup" in command) and not Path("soup").exists():
        assert cli(["uniform", "run1", "run2", "run3", "-o", "soup", "--quiet"]) == 0
    if page == HELP and command == "streamsoup commit soup":
        shutil.rmtree("soup", ignore_errors=True)
        assert cli(["uniform", "run1", "run2", "-o", "soup", "--part", "1/1", "--quiet"]) == 0


HELP = "the examples of --help"
PAGES = {page: [command for found, command in ALL if found == page] for page, _ in ALL}
PAGES["README.md"] = commands_of_readme(README)
PAGES[HELP] = [entry.example for entry in COMMANDS.values()]


def reason(command: str) -> str | None:
    """Return why a command is not run, or None."""
    return next((why for part, why in NOT_RUN.items() if part in command), None)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(
    page: str, world: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """One after the other, each command of a page does what it says, and ends with 0."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("PATH", f"{world / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if page == "tasks/on-a-cluster.md":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    if page == "tasks/pickled-checkpoints.md":
        monkeypatch.chdir(_empty(world / "pickles"))
        pickles()
    for command in PAGES[page]:
        if reason(command):
            continue
        prepare(page, command)
        assert line(command) == 0, command


def _empty(folder: Path) -> Path:
    for name in ("run1", "run2", "run3"):
        (folder / name).mkdir(parents=True)
    return folder


def test_each_reason_is_that_of_a_command() -> None:
    """What is not run is in the documentation; and little of it is not run."""
    every = [command for page in PAGES.values() for command in page]
    assert all(any(part in command for command in every) for part in NOT_RUN)
    assert sum(reason(command) is not None for command in every) < len(every) / 8


def test_a_planted_command_fails(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that parses and names what is not there does not end with 0."""
    monkeypatch.chdir(world)
    assert line("streamsoup uniform run1 run7 -o soup7") == 1


def test_the_trap_of_torch_is_as_told() -> None:
    """The example of coming-from/swa-utils.md prints what its comment says."""
    page = (DOCS / "coming-from" / "swa-utils.md").read_text()
    (block,) = blocks(page, "python")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, {})
    said = re.findall(r"# ([\d.]+), though ([\d.]+) is nearer", block)
    assert said == [(out.getvalue().strip(), "1.0078125")]


def test_the_rule_of_its_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of docs/joints/rule.md is a soup, and verifies."""
    monkeypatch.chdir(tmp_path)
    values = [np.random.default_rng(i).normal(size=500).astype("f4") for i in range(3)]
    for i, value in enumerate(values):
        save(tmp_path / f"run{i + 1}", {"w": tensor(value)})
    rule, use = blocks((DOCS / "joints" / "rule.md").read_text(), "python")
    exec(rule + use, {"__name__": "page"})
    written = (tmp_path / "soup" / "model.safetensors").read_bytes()
    assert written.endswith(np.median(values, axis=0).astype("f4").tobytes())


def test_the_sinks_of_their_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stream of docs/joints/sink.md has every tensor, and its sink counts every byte."""
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        save(tmp_path / f"run{i}", {"w": tensor(np.full(7, i, np.float32))})
    stream, sink = blocks((DOCS / "joints" / "sink.md").read_text(), "python")
    known: dict[str, Any] = {"__name__": "page"}
    exec(stream, known)
    assert capsys.readouterr().out == "w (7,)\n"
    assert known["state_dict"]["w"].tolist() == pytest.approx([1.7] * 7)
    sums: list[Any] = []
    exec(
        sink.replace("streamsoup.mix_to(Counting", "streamsoup.mix_to(keep(Counting)"),
        known | {"keep": lambda kind: lambda plan: sums.append(kind(plan)) or sums[-1]},
    )
    assert sums[0].nbytes == 28
