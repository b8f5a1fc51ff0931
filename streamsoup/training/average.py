"""`Average`: the average of a model over its training, updated as it goes.

Four methods, with the arithmetic of the commands of the same names over saved checkpoints:
``uniform``, ``lawa`` (the last ones) and ``wsm`` give the same bytes, and ``ema`` the same values
up to the rounding of float64 sums. An average of bfloat16 weights therefore moves by updates that
bfloat16 itself would round away.

>>> import torch
>>> average = Average("ema", decay=0.5)
>>> for value in (0.0, 1.0):
...     average.update({"w": torch.full((2,), value)})
>>> average.result()
{'w': tensor([0.5000, 0.5000])}
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from streamsoup.cluster.choice import refuse_spread
from streamsoup.errors import (
    MismatchError,
    NonFiniteError,
    RecipeError,
    printable,
    some,
)
from streamsoup.live.matching import memory_of
from streamsoup.options import Options, check_options
from streamsoup.recipe import Coefficients
from streamsoup.training.arithmetic import Arithmetic
from streamsoup.training.copies import Arrived, Copies, is_away, staged_nbytes
from streamsoup.training.device import DeviceSums
from streamsoup.training.host import HostSums, sums_nbytes
from streamsoup.training.live import (
    Layout,
    Live,
    as_sharded,
    check_same,
    check_targets,
    dtype_of,
    is_mask,
    read_live,
    same_bits,
    version_of,
)
from streamsoup.training.running import Step, Weights, wsm_weights
from streamsoup.training.saved_state import VERSION, layout_of
from streamsoup.training.settings import Curve, Method, settings_of
from streamsoup.training.window import Window, state_nbytes

if TYPE_CHECKING:
    from streamsoup.output.make import Soup

__all__ = ["Average", "AverageMemory", "Method"]

Given = nn.Module | Mapping[str, Any]


class AverageMemory(msgspec.Struct, frozen=True):
    """The bytes that an average holds, beside blocks of some megabytes."""

    host_nbytes: int
    """In memory, of this process."""
    device_nbytes: int
    """On the device of the model."""
    disk_nbytes: int
    """In files without names, which are gone when the process ends."""


class Average:
    """The average of a model, or of state dicts, over its updates.

    Danger: a frozen parameter (`frozen` is ``keep``) is not copied. Assigning to its ``data``,
    which torch does not note, changes the average as well.
    """

    def __init__(
        self,
        method: Method = "uniform",
        *,
        decay: float | None = None,
        window: int | None = None,
        curve: Curve | None = None,
        n: int | None = None,
        precision: Literal["float64", "float32"] = "float64",
        place: str | os.PathLike[str] = "host",
        frozen: Literal["keep", "average"] = "keep",
        non_finite: Literal["refuse", "propagate"] = "refuse",
        threads: int | None = None,
    ) -> None:
        """Begin an average that has had no update; nothing is reserved yet.

        Args:
            method: ``uniform``: all updates alike. ``ema``: the first update starts it, and each
                later one keeps `decay` of what was there. ``lawa``: the last `window` updates
                alike. ``wsm``: weighted by `curve`, in place of a decay of the learning rate.
            decay: For ``ema``, ``0 ≤ d < 1``; 0.999 unless given.
            window: For ``lawa``, at least 1.
            curve: For ``wsm``: ``linear``, ``cosine`` or ``sqrt``; ``linear`` unless given.
            n: For ``wsm``, how many updates there will be. Without it, the states of all updates
                are kept in a folder: see `place`.
            precision: Of sums: ``float64``, or ``float32`` for pairs of a sum and what its
                roundings left out, for devices on which float64 is slow.
            place: Where sums and windows are kept: ``host`` memory, the ``device`` of the model,
                or a folder, for files that are gone when the process ends.
            frozen: Parameters of a module that do not ask for gradients: ``keep`` them as they
                are, without a copy, or ``average`` them like the others.
            non_finite: ``refuse`` results with NaN or Inf, or ``propagate`` them.
            threads: Threads that add; None for the CPUs of this process, 8 at most.

        Raises:
            RecipeError: A setting makes no sense, or belongs to another method.
        """
        self._settings = settings_of(
            method, decay, window, curve, n, precision, os.fsdecode(place), frozen, non_finite
        )
        self._threads = Options(threads=threads).n_threads
        self._copies: Copies | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all updates, and release what they took."""
        self._weights = self._new_weights()
        self._layout: Layout | None = None
        self._sums: HostSums | DeviceSums | None = None
        self._window: Window | None = None
        self._newest: dict[str, Tensor] = {}
        self._frozen: dict[str, Tensor] = {}
        self._frozen_versions: dict[str, int] = {}
        self._masks: dict[str, Tensor] = {}
        self._sharded: dict[str, Any] = {}
        self._module: nn.Module | None = None
        self._n = 0
        self._interrupted = False
        if self._copies is not None:
            self._copies.abandon()
        self._copies = Copies() if self._settings.copies_ahead else None

    def __repr__(self) -> str:
        """Return a one-line summary for the REPL."""
        return f"<Average: {self._settings.method}, {self._n} updates>"

    @property
    def method(self) -> str:
        """The method, as given."""
        return self._settings.method

    @property
    def n_updates(self) -> int:
        """How many updates it has had."""
        return self._n

    @property
    def ready(self) -> bool:
        """True if there is a result: after an update, or all of them for ``wsm`` with n."""
        wanted = self._settings.n if self._window is None else 1
        return not self._interrupted and self._n >= (wanted or 1)

    def memory(self, model: Given) -> AverageMemory:
        """Return what the average of a model will hold, in this process. Reads no weights.

        Raises:
            MismatchError: The model holds what cannot be averaged.
            RecipeError: The window has no end: ``wsm`` without n.
        """
        settings = self._settings
        live = self._read(model)
        if settings.keeps_window:
            if settings.window is None:
                raise RecipeError("wsm without n keeps the states of all updates; there is no end")
            nbytes = settings.window * state_nbytes(live.layout.averaged)
        else:
            keeps = self._weights.keeps_equal and settings.place != "device"
            nbytes = sums_nbytes(live.layout.averaged, keeps_equal=keeps)
        extra = state_nbytes(live.layout.newest)
        if settings.place == "device":
            return AverageMemory(0, nbytes + extra, 0)
        on_disk = settings.folder is not None
        if settings.copies_ahead:
            extra += staged_nbytes(self._away(live))
        return AverageMemory(extra + (0 if on_disk else nbytes), 0, nbytes if on_disk else 0)

    def update(self, model: Given) -> None:
        """Add the present values of a model, or of a state dict, to the average.

        Floating parameters and buffers are averaged; of integer buffers, and all else that is not
        floating, the newest are kept. A module may be wrapped (`torch.compile`, DDP, FSDP2): names
        are those of the model inside, and each process averages the parts that it has.

        Args:
            model: With the tensors of all updates before.

        Raises:
            MismatchError: Other tensors than before, or such as cannot be averaged.
            RecipeError: More updates than ``wsm`` was begun for.

        Costs, in memory traffic, a read of the model and a read and write of its float64 sums; a
        window is written once. From a device to host memory the copies are queued, and added up in
        a thread while the device goes on: what fails there is raised by the next call.
        """
        live = self._read(model)
        self._check_whole()
        if self._layout is None:
            self._begin(live.layout, live.tensors)
        else:
            check_same(self._layout, live.layout, "the model")
            self._check_frozen()
        assert self._layout is not None
        step = self._weights.next() if self._window is None else None
        self._interrupted = True
        away = self._away(live) if self._copies is not None else {}
        if away and self._copies is not None and self._copies.reserve(away):
            self._add_later(live, away, step, self._copies)
        else:
            self._note(live)
            tensors = {name: live.tensors[name] for name in self._layout.averaged}
            if self._window is not None:
                self._window.add(tensors)
            else:
                assert self._sums is not None
                assert step is not None
                self._sums.add(tensors, step)
        self._n += 1
        self._interrupted = False

    def _away(self, live: Live) -> dict[str, Tensor]:
        """Return what is copied from devices at each update: averaged tensors, and the newest."""
        names = [*live.layout.averaged, *live.layout.newest]
        return {name: live.tensors[name] for name in names if is_away(live.tensors[name])}

    def _add_later(
        self, live: Live, away: Mapping[str, Tensor], step: Step | None, copies: Copies
    ) -> None:
        """Add the tensors that are here, and those of devices once they have arrived."""
        self._note(live, away)
        assert self._layout is not None
        averaged, window, sums = self._layout.averaged, self._window, self._sums
        newest = {name: self._newest[name] for name in self._layout.newest if name in away}
        here = {name: live.tensors[name] for name in averaged if name not in away}
        state = None
        if window is not None:
            state = window.begin({name: live.tensors[name] for name in averaged}, here)
        elif sums is not None and step is not None:
            sums.add(here, step)

        def add(arrived: Sequence[Arrived]) -> None:
            for name, begin, end, values in arrived:
                if name in newest:
                    newest[name].view(-1)[begin:end].copy_(values)
            found = [each for each in arrived if each.name in averaged]
            if window is not None and state is not None:
                window.add_arrived(state, found)
            elif sums is not None and step is not None:
                sums.add_arrived(found, step)

        copies.begin(away, add)

    def result(self) -> dict[str, Tensor]:
        """Return the average as a state dict of the model, in its dtypes.

        Returns:
            Tensors by the names of the model without its wrappers: on the CPU; on the model's
            device if the average is kept there; DTensors where the model has them. Tied names have
            one tensor. Frozen parameters are the model's own, not copies.

        Raises:
            RecipeError: There was no update, or ``wsm`` has not had all of them.
            NonFiniteError: An average is not finite; names the tensors.

        Costs a read of the sums, or of the window, and holds the state dict.
        """
        self._check_ready()
        assert self._layout is not None
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(self._layout.names.values()):
            local, whole = self._local(name), self._sharded.get(name)
            found[name] = local if whole is None else as_sharded(local, whole)
        return {name: found[owner] for name, owner in self._layout.names.items()}

    def apply_to(self, model: nn.Module) -> None:
        """Put the average into a model, in place: parameters and buffers stay the same objects.

        Args:
            model: With the tensors of the updates; wrapped or not, on any device.

        Raises:
            MismatchError: The model has other tensors than the average.
            RecipeError: As for `result`.
            NonFiniteError: As for `result`; the model then holds a part of the average.

        Costs as `result`, but holds one tensor at a time.
        """
        self._check_ready()
        assert self._layout is not None
        for name, target in self._targets(model).items():
            with torch.no_grad():
                target.copy_(self._local(self._layout.names[name]))

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put the average into a model for a ``with`` block, and its own values back at the end.

        Args:
            model: As for `apply_to`.

        Yields:
            The model.

        Raises:
            StreamsoupError: Those of `apply_to`; the model is then as it was.

        Holds a copy of what is exchanged, on the model's device.
        """
        self._check_ready()
        kept = [(target, target.clone()) for target in self._targets(model).values()]
        try:
            self.apply_to(model)
            yield model
        finally:
            with torch.no_grad():
                for target, own in kept:
                    target.copy_(own)

    def save(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Soup | None:
        """Write the average as a checkpoint: what ``from_pretrained`` or ``load_state_dict`` opens.

        Args:
            folder: To make; complete, or absent.
            model: Whose names and configuration the checkpoint has; None for the model of the last
                update, or plain names after updates with state dicts.
            options: As for every verb: `dtype`, `shard_size`, `overwrite` and others.

        Returns:
            The soup. Of a model whose tensors are spread over processes (DTensors) all processes
            must call this: the first one writes the checkpoint, and the others return None.

        Raises:
            StreamsoupError: Those of `result` and of `uniform`.

        Holds the state dict of the result.
        """
        from streamsoup.training.saving import save

        check_options(options, Options)
        refuse_spread(options, "an average in training")
        if options.part is not None:
            raise RecipeError("an average is saved whole; leave part out")
        module = self._module if model is None else model
        report = {"n_updates": self._n}
        for name in ("decay", "window", "curve"):
            if (value := getattr(self._settings, name)) is not None:
                report[name] = value
        return save(self.result(), module, folder, self.method, report, options)

    def merge(self, other: Average) -> None:
        """Add the updates of another average of the same model, as if they had come next.

        Args:
            other: Of the same method; not changed.

        Raises:
            RecipeError: Another method, or one of ``ema`` and ``wsm`` with n, in which each update
                depends on those before it.
            MismatchError: Another model.

        Costs a read of both, and a write of this one.
        """
        if self._settings.values != other._settings.values:
            raise RecipeError(f"{other!r}: cannot be merged into {self!r}; their settings differ")
        if self.method == "ema" or (self.method == "wsm" and self._settings.n is not None):
            raise RecipeError(
                f"averages of method {self.method} cannot be merged, as each update depends on "
                "those before it"
            )
        self._check_whole()
        other._check_whole()
        if other._layout is None:
            return
        if (self._settings.place == "device") != (other._settings.place == "device"):
            raise RecipeError("averages kept on a host and on a device cannot be merged")
        if self._layout is None:
            self._begin(other._layout, other._samples())
        check_same(other._layout, self._layout or other._layout, "the other average")
        for name, mask in other._masks.items():
            if self._n == 0:
                self._masks[name] = mask.clone()
        for name in [*self._masks]:
            if name not in other._masks or not same_bits(self._masks[name], other._masks[name]):
                del self._masks[name]
        self._interrupted = True
        if self._window is not None:
            assert other._window is not None
            self._window.extend(other._window)
        else:
            assert self._sums is not None
            assert other._sums is not None
            if self._n == 0:
                self._sums.load(other._sums.state())
            elif isinstance(self._sums, HostSums):
                assert isinstance(other._sums, HostSums)
                self._sums.merge(other._sums)
            else:
                assert isinstance(other._sums, DeviceSums)
                self._sums.merge(other._sums)
        self._weights.n += other._weights.n
        self._weights.divisor += other._weights.divisor
        self._n += other._n
        self._newest = {name: tensor.clone() for name, tensor in other._newest.items()}
        self._frozen |= other._frozen
        self._interrupted = False

    def state_dict(self) -> dict[str, Any]:
        """Return all of the average, to be saved with ``torch.save`` and loaded with weights only.

        Sums and windows are references, not copies: save them before the next update. Frozen
        parameters are left out. Of DTensors it holds the part of this process.
        """
        self._check_whole()
        layout = self._layout
        return {
            "version": VERSION,
            "settings": self._settings.values,
            "n_updates": self._n,
            "weights": {"n": self._weights.n, "divisor": self._weights.divisor},
            "layout": None if layout is None else msgspec.to_builtins(layout),
            "sums": {} if self._sums is None else self._sums.state(),
            "window": [] if self._window is None else [dict(s) for s in self._window.states],
            "newest": dict(self._newest),
            "masks": dict(self._masks),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module | None = None) -> None:
        """Continue an average that was saved, bit for bit; what this one held is dropped.

        Args:
            state: What `state_dict` returned.
            model: The model, where results are wanted before the next update: it has the frozen
                parameters, and which tensors are DTensors, which a state does not hold.

        Raises:
            RecipeError: It is no such state, or one of other settings.
            MismatchError: The model has other tensors.
        """
        found = layout_of(state, self._settings)
        live = None if model is None else self._read(model)
        if live is not None and found is not None:
            check_same(found, live.layout, "the model")
        self.reset()
        if found is not None:
            held = {**state["sums"], **(state["window"][-1] if state["window"] else {})}
            samples = held if live is None else live.tensors
            self._begin(found, samples)
            self._interrupted = True
            try:
                if self._window is not None:
                    self._window.load(state["window"])
                else:
                    assert self._sums is not None
                    self._sums.load(state["sums"])
            except (KeyError, RuntimeError, TypeError, AttributeError) as error:
                raise RecipeError(
                    f"the state of the Average is damaged ({type(error).__name__}: "
                    f"{printable(str(error))}); load another one"
                ) from None
        weights = state["weights"]
        self._weights.n, self._weights.divisor = weights["n"], weights["divisor"]
        self._n, self._interrupted = state["n_updates"], False
        self._newest = {name: tensor.clone() for name, tensor in state["newest"].items()}
        self._masks = {name: tensor.clone() for name, tensor in state["masks"].items()}
        if live is not None:
            self._bind(live)

    def _new_weights(self) -> Weights:
        settings = self._settings
        known = settings.method == "wsm" and settings.n is not None
        coefficients = wsm_weights(settings.n or 0, settings.curve or "linear") if known else None
        return Weights(coefficients, settings.decay)

    def _read(self, model: Given) -> Live:
        return read_live(model, keep_frozen=self._settings.frozen == "keep")

    def _begin(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """Reserve what the method keeps, where the settings say; `tensors` show the devices."""
        settings, specs = self._settings, layout.averaged
        nbytes: dict[Any, int] = {}
        for spec in specs.values():
            dtype = dtype_of(spec)
            nbytes[dtype] = nbytes.get(dtype, 0) + state_nbytes({"": spec})
        arithmetic = Arithmetic(nbytes, self._threads)
        on_device = settings.place == "device"
        if settings.keeps_window:
            self._window = Window(
                specs, arithmetic, settings.window, folder=settings.folder, on_device=on_device
            )
        elif on_device or settings.precision == "float32":
            paired = settings.precision == "float32"
            held = (
                tensors
                if on_device
                else {name: torch.empty(t.numel()) for name, t in tensors.items()}
            )
            self._sums = DeviceSums(held, specs, arithmetic, paired=paired)
        else:
            keeps = self._weights.keeps_equal
            self._sums = HostSums(specs, arithmetic, settings.folder, keeps_equal=keeps)
        self._layout = layout

    def _samples(self) -> Mapping[str, Tensor]:
        """Return tensors that lie where those of the updates did."""
        if self._window is not None:
            return self._window.states[-1]
        assert self._sums is not None
        return self._sums.state()

    def _note(self, live: Live, away: Collection[str] = ()) -> None:
        """Keep what is not summed: the newest of integers, frozen parameters, masks of −inf.

        The newest of tensors that are `away` get a place that they will be copied to.
        """
        assert self._layout is not None
        for name in self._layout.averaged:
            if self._n and name not in self._masks:
                continue
            tensor = live.tensors[name]
            if self._n == 0:
                if is_mask(tensor):
                    self._masks[name] = tensor.clone()
            elif not same_bits(self._masks[name], tensor):
                del self._masks[name]
        for name in self._layout.newest:
            tensor = live.tensors[name]
            if name in away:
                self._newest[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                continue
            kept = tensor if self._settings.place == "device" else tensor.cpu()
            self._newest[name] = kept.clone() if kept is tensor else kept
        self._bind(live)

    def _bind(self, live: Live) -> None:
        """Remember the model: its frozen parameters, its DTensors, and what saving needs."""
        self._frozen = {name: live.tensors[name] for name in live.layout.frozen}
        self._frozen_versions = {name: version_of(t) for name, t in self._frozen.items()}
        self._sharded, self._module = live.sharded, live.module

    def _check_frozen(self) -> None:
        changed = [
            name
            for name, version in self._frozen_versions.items()
            if version_of(self._frozen[name]) != version
        ]
        if changed:
            raise MismatchError(
                f"{some(changed)}: asks for no gradient, and was changed since the last update; "
                "give frozen='average' to average such parameters"
            )

    def _check_whole(self) -> None:
        """Wait for the last update, and raise unless it was added as a whole."""
        if self._copies is not None:
            self._copies.settle()
        if self._interrupted:
            raise RecipeError(
                "an update was interrupted, and the average holds a part of it; load the last "
                "saved state, or begin a new Average"
            )

    def _check_ready(self) -> None:
        """Raise unless there is a result."""
        self._check_whole()
        if self._n == 0:
            raise RecipeError("the average has had no update; update it before it is used")
        if self._window is None:
            self._weights.check_complete()
        self._check_frozen()

    def _targets(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a model that a result goes to: not frozen ones of its own."""
        live = self._read(model)
        assert self._layout is not None
        check_targets(self._layout, live.layout)
        return {
            name: tensor
            for name, tensor in live.tensors.items()
            if memory_of(name, tensor)
            != memory_of(name, self._frozen.get(name, tensor.new_empty(0)))
        }

    def _local(self, name: str) -> Tensor:
        """Return the part of one tensor's average that lies in this process."""
        assert self._layout is not None
        if name in self._newest:
            return self._newest[name].clone()
        if name in self._layout.frozen:
            if name not in self._frozen:
                raise MismatchError(
                    f"{some([name])}: frozen parameters are not part of a saved state; give the "
                    "model to load_state_dict, or update first"
                )
            return self._frozen[name]
        if name in self._masks:
            return self._masks[name].clone()
        if self._window is not None:
            n = len(self._window.states)
            curve = self._settings.curve
            mean = Coefficients.uniform(n)
            chosen = mean if curve is None else wsm_weights(n, curve)
            made, spoiled = self._window.finish(name, chosen)
        else:
            assert self._sums is not None
            made, spoiled = self._sums.finish(name, self._weights.divisor)
        if spoiled and self._settings.non_finite == "refuse":
            raise NonFiniteError(
                f"{some([name])}: the average holds a NaN or an Inf, as an update did or its sum "
                "overflowed; begin it later, or give non_finite='propagate'"
            )
        return made
