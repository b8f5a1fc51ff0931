"""The peers: what else makes a soup, each a short script, in an environment with what it needs.

Scripts are called as ``python script.py OUTPUT INGREDIENT...``, all of them folders, and are not
imported from here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import Case, cache_folder

__all__ = ["PEERS", "Peer", "command", "install"]

CONSTRAINTS = ("torch==2.13.0", "numpy==2.4.6", "safetensors==0.8.0")
"""The same for all peers. Where a CPU build of this torch is not what pip gives, that is where to
say so: torch is the bulk of every environment."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to make a soup."""

    name: str
    script: str
    package: str | None = None
    """What to install beside torch and safetensors, pinned."""
    env: tuple[tuple[str, str], ...] = ()
    one_file: bool = False
    """True if it reads checkpoints of one shard only."""
    holds_all: bool = False
    """True if it holds several whole models at once."""

    @property
    def room(self) -> str:
        """The name of its environment; peers without a package share one."""
        return (self.package or "torch").partition("==")[0]


PEERS = (
    Peer("naive torch", "naive", holds_all=True),
    Peer("paper's running sum", "running_sum"),
    Peer("torch, tensor by tensor", "streaming_torch"),
    Peer("torch swa_utils", "swa_utils"),
    Peer("timm's script", "timm_script"),
    Peer("NeMo-Skills' manner", "shard_by_shard"),
    Peer("mergekit, default", "mergekit_merge", "mergekit==0.1.5", (("MERGEKIT", "default"),)),
    Peer("mergekit, float32", "mergekit_merge", "mergekit==0.1.5", (("MERGEKIT", "float32"),)),
    Peer("mergekit, best flags", "mergekit_merge", "mergekit==0.1.5", (("MERGEKIT", "best"),)),
    Peer("sd-mecha", "sd_mecha_average", "sd-mecha==1.1.8", one_file=True),
    Peer("fusion_bench", "fusion_bench_average", "fusion-bench==0.2.33", holds_all=True),
)


def python_of(peer: Peer) -> Path:
    """Return the interpreter of a peer's environment."""
    return cache_folder() / "peers" / peer.room / "bin" / "python"


def install(peers: Sequence[Peer] = PEERS) -> dict[str, str]:
    """Make the environments that are missing; give the reason for each that cannot be made."""
    failed: dict[str, str] = {}
    for peer in peers:
        python = python_of(peer)
        done = python.parent.parent / "done"
        if done.exists() or peer.room in failed:
            continue
        print(f"setting up {peer.room}", file=sys.stderr, flush=True)
        venv = [sys.executable, "-m", "venv", str(python.parent.parent)]
        constraints = python.parent.parent / "constraints.txt"
        packages = [*CONSTRAINTS, *([peer.package] if peer.package else [])]
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        try:
            subprocess.run(venv, check=True, capture_output=True)
            constraints.write_text("\n".join(CONSTRAINTS))
            subprocess.run(
                [*pip, "-c", str(constraints), *packages], check=True, capture_output=True
            )
            freeze = [*pip[:-2], "freeze"]
            result = subprocess.run(freeze, check=True, capture_output=True)
            done.write_bytes(result.stdout)
        except subprocess.CalledProcessError as error:
            failed[peer.room] = (error.stderr or b"").decode().strip().rpartition("\n")[2][:300]
    return failed


def versions(peer: Peer) -> dict[str, str]:
    """Return the versions of what a peer is made of."""
    wanted = {"torch", "safetensors", "transformers", peer.room}
    lines = (python_of(peer).parent.parent / "done").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line.count("==") == 1)
    return {name: number for name, number in pairs if name.replace("_", "-") in wanted}


def command(peer: Peer, output: Path, ingredients: Sequence[Path]) -> list[str]:
    """Return the command that makes the soup."""
    script = Path(__file__).parent / f"{peer.script}.py"
    return [str(python_of(peer)), str(script), str(output), *map(str, ingredients)]


def why_not(peer: Peer, case: Case, available: int) -> str | None:
    """Return why a peer cannot do a case here, or None."""
    if peer.one_file and case.n_shards > 1:
        return "reads single files only"
    if peer.holds_all and case.nbytes_each * case.n * 2 > available:
        return "would need more memory than there is"
    return None
