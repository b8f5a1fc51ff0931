"""Averages of modules: buffers, ties, frozen parameters, and what wraps a module."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import average_processes
import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from streamsoup import Average
from streamsoup.errors import MismatchError


class Network(nn.Module):
    """A tied pair, BatchNorm with its counter, and a parameter that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Network:
    """The network, with the same weights each time."""
    torch.manual_seed(0)
    return Network()


def train(model: nn.Module, steps: int = 1, seed: int = 0) -> None:
    """Take steps of SGD on random tokens."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        tokens = torch.randint(0, 11, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), tokens.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(model: nn.Module, average: Average, n: int = 4) -> dict[str, Tensor]:
    """Train, update after each step, and return the float64 mean of all states, by name."""
    sums: dict[str, Tensor] = {}
    for step in range(n):
        train(model, seed=step)
        average.update(model)
        for name, tensor in model.state_dict().items():
            wide = tensor.double()
            sums[name] = wide if name not in sums else sums[name] + wide
    return {name: total / n for name, total in sums.items()}


def test_a_module_is_averaged_with_its_buffers(model: Network) -> None:
    """The float64 mean of parameters and floating buffers, rounded; the newest counter."""
    average = Average()
    expected = run(model, average)
    result = average.result()
    assert result.keys() == model.state_dict().keys()
    for name, tensor in result.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert result["norm.num_batches_tracked"] == 4
    assert result["embed.weight"] is result["head.weight"]
    assert average.memory(model).host_nbytes < 8 * sum(p.numel() for p in model.parameters()) + 2000
    model.load_state_dict(result)


def test_values_of_averaged_model(model: Network) -> None:
    """The tool of torch, in float64 where it is exact enough, gives the same EMA."""
    theirs = AveragedModel(model.double(), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average = Average("ema", decay=0.9)
    for step in range(30):
        train(model, seed=step)
        average.update(model)
        theirs.update_parameters(model)
    found = average.result()
    for name, parameter in theirs.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-12, atol=1e-14)


def test_swap_evaluates_with_the_average_and_puts_back(model: Network) -> None:
    """To the bit, in place, ties kept; after an error within, too."""
    average = Average("ema", decay=0.5)
    run(model, average)
    before = copied(model)
    pointers = [each.data_ptr() for each in model.parameters()]
    result = average.result()

    def evaluate() -> None:
        with average.swap(model) as inside:
            assert inside is model
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, result[name]), name
            assert model.head.weight is model.embed.weight
            train(model.train())  # changes what is put back: parameters, statistics, the counter
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [each.data_ptr() for each in model.parameters()] == pointers
    average.apply_to(model)
    assert all(torch.equal(t, result[name]) for name, t in model.state_dict().items())
    other = Network()
    average.apply_to(other)
    assert all(torch.equal(t, result[name]) for name, t in other.state_dict().items())
    with pytest.raises(MismatchError, match="the model: has other tensors"):
        average.apply_to(nn.Linear(2, 2))


def test_optimizers_go_on_after_a_swap(model: Network) -> None:
    """A run that swaps for evaluation trains to the same bits as one that does not."""
    other = copy.deepcopy(model)
    average = Average("lawa", window=2)
    for step in range(4):
        for each in (model, other):
            train(each, seed=step)
        average.update(model)
        with average.swap(model):
            pass
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_frozen_parameters_are_kept_without_a_copy(model: Network) -> None:
    """They cost no memory; thawed or changed ones are refused by name."""
    model.conv.requires_grad_(False)
    average = Average()
    run(model, average, 2)
    result = average.result()
    assert result["conv.weight"].data_ptr() == model.conv.weight.data_ptr()
    assert average.memory(model).host_nbytes < Average(frozen="average").memory(model).host_nbytes
    average.apply_to(model)
    with average.swap(model):
        pass
    average.update(model)
    state = average.state_dict()
    fresh = Average()
    fresh.load_state_dict(state)
    with pytest.raises(MismatchError, match=r"conv\.weight: frozen parameters are not part"):
        fresh.result()
    fresh.load_state_dict(state, model)
    assert torch.equal(fresh.result()["conv.weight"], model.conv.weight)
    model.conv.requires_grad_(True)
    with pytest.raises(MismatchError, match="frozen when the average began, and trained now"):
        average.update(model)
    model.conv.requires_grad_(False)
    with torch.no_grad():
        model.conv.weight.add_(1.0)
    with pytest.raises(MismatchError, match=r"conv\.weight: asks for no gradient, and was changed"):
        average.update(model)


def test_frozen_parameters_can_be_averaged(model: Network) -> None:
    """As a teacher that is changed by hand."""
    model.requires_grad_(False)
    average = Average(frozen="average")
    for value in (1.0, 3.0):
        with torch.no_grad():
            model.embed.weight.fill_(value)
        average.update(model)
    assert average.result()["embed.weight"].unique().tolist() == [2.0]


def test_compiled_modules_have_plain_names(model: Network) -> None:
    """A module compiled as a whole, or within; its average loads into the plain one."""
    compiled: Any = torch.compile(model, backend="eager")
    average = Average()
    average.update(compiled)
    model.conv = torch.compile(model.conv, backend="eager")  # type: ignore[assignment]
    average.update(model)
    average.update(AveragedModel(model))
    assert average.result().keys() == Network().state_dict().keys()
    Network().load_state_dict(average.result())
    with average.swap(compiled):
        pass


def test_fsdp1_is_refused(model: Network) -> None:
    """Its parameters are joined into flat ones; the message says what to use."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

    with pytest.raises(MismatchError, match="fully_shard"):
        Average().update(FullyShardedDataParallel())


def test_what_deepspeed_took_apart_is_refused(model: Network) -> None:
    """Its parameters hold no elements, and averages of them would be empty."""
    model.embed.weight.ds_id = 1  # type: ignore[attr-defined]
    with pytest.raises(MismatchError, match=r"embed\.weight, head\.weight: partitioned"):
        Average().update(model)


def test_a_saved_module_loads(model: Network, tmp_path: Path) -> None:
    """By ``load_state_dict``, and as safetensors loads a module with tied weights."""
    average = Average()
    run(model, average)
    average.save(tmp_path / "soup")
    found = load_file(tmp_path / "soup" / "model.safetensors")
    other = Network()
    other.load_state_dict(found)
    load_model(other, tmp_path / "soup" / "model.safetensors", strict=False)
    assert all(torch.equal(t, found[name]) for name, t in average.result().items())


def test_two_processes_average_the_parts_they_have(tmp_path: Path) -> None:
    """DDP and FSDP2 under gloo: the same bits as one process, in results, in the model, on disk."""
    script = average_processes.__file__
    children = [
        subprocess.Popen([sys.executable, script, str(rank), str(tmp_path)]) for rank in (0, 1)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    alone = average_processes.network()
    expected = {
        method: average.result()
        for method, average in average_processes.averaged(alone, alone).items()
    }
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found-{rank}.pt", weights_only=True)
        for method, result in expected.items():
            for how in ("ddp", "fsdp", "swapped"):
                made = found[f"{how}-{method}"]
                assert made.keys() == result.keys()
                for name, tensor in result.items():
                    assert torch.equal(made[name], tensor), (how, method, name)
    for method, result in expected.items():
        saved = load_file(tmp_path / f"soup-{method}" / "model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in result.items())
