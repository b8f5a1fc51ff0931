"""Digests made along with the sums are those of xxhash's library, however bytes come in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash
from checkpoints import save, tensor
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from streamsoup import Options, uniform, verify
from streamsoup.engine import budget, reduce
from streamsoup.errors import VerificationError
from streamsoup.kernels import cpu
from streamsoup.kernels.constants import LEAST_NBYTES, SCRAMBLE_NBYTES, STRIPE_NBYTES
from streamsoup.kernels.leaf_digests import LeafDigests
from streamsoup.tensors import DTYPES

PAIRS = [
    *(("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("F64", "F64"), ("F8_E4M3", "F8_E4M3")),
    *(("BF16", "F32"), ("F32", "BF16"), ("F64", "F8_E5M2")),
]


def digested(
    inputs: list[np.ndarray], source: str, output: str, n: int, block: int, group: int
) -> tuple[bytes, bytes]:
    """Mix `n` elements in blocks and groups, all of them digested; give the result as well."""
    k, size, to_size = len(inputs), DTYPES[source].itemsize, DTYPES[output].itemsize
    kernel = cpu.mixer(DTYPES[source], DTYPES[output])
    digests = LeafDigests(k)
    result = np.zeros(n * to_size + 1, np.uint8)
    sums = np.empty(block)
    for start in range(0, n, block):
        m = min(block, n - start)
        for first in range(0, k, group):
            addresses = [x.ctypes.data + start * size for x in inputs[first : first + group]]
            ends = first + group >= k
            kernel(
                0 if group >= k else sums.ctypes.data,
                addresses,
                [1.0] * len(addresses),
                first == 0,
                float(k),
                result.ctypes.data + start * to_size if ends else 0,
                m,
                digests.address(first),
                n if start + m == n else 0,
            )
    return digests.joined(), result[: n * to_size].tobytes()


@pytest.mark.parametrize(("source", "output"), PAIRS)
@settings(max_examples=60, deadline=None)
@given(data=some.data())
def test_kernels_digest_as_the_library_does(
    source: str, output: str, data: some.DataObject
) -> None:
    """Of any length from the least on, at any address, in any blocks, in groups or all at once."""
    size, to_size = DTYPES[source].itemsize, DTYPES[output].itemsize
    least = -(-LEAST_NBYTES // min(size, to_size))
    block = SCRAMBLE_NBYTES << data.draw(some.integers(0, 3), "block")
    whole = data.draw(
        some.sampled_from([0, block, 3 * block, SCRAMBLE_NBYTES // size, 64 // size]), "whole"
    )
    n = max(least, whole + data.draw(some.integers(-70, 1100), "more"))
    assume((n - 1) % block + 1 >= -(-STRIPE_NBYTES // min(size, to_size)))
    k = data.draw(some.integers(1, 11), "k")
    group = data.draw(some.sampled_from([k, 1, 3]), "group")
    at = data.draw(some.integers(0, 70), "address")
    rng = np.random.default_rng(n)
    rows = [rng.integers(0, 256, at + n * size, np.uint8) for _ in range(k)]
    inputs = [row[at:] for row in rows]
    digests, result = digested(inputs, source, output, n, block, group)
    assert digests == b"".join(map(xxhash.xxh3_128_digest, [result, *inputs]))


@pytest.mark.parametrize(
    "n", [1, 50, 120, 121, 240, 241, 512, 600, 4096, 4097, 4127, 4128, 4160, 12_345]
)
@pytest.mark.parametrize(
    ("io", "dtype"), [("mmap", "same"), ("read", "same"), ("mmap", "bfloat16")]
)
def test_soups_have_the_digests_of_the_library(
    n: int, io: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sums, compiled kernels or numpy, small tensors and large ones; `verify` agrees."""
    monkeypatch.setattr(budget, "LARGEST_BLOCK", 4096)
    for name in ("F64", "F32", "BF16", "F8_E4M3"):
        cpu.mixer(DTYPES[name], DTYPES[name if dtype == "same" else "BF16"])  # found from then on
    rng = np.random.default_rng(n)
    paths = []
    for i in range(9):
        values = rng.standard_normal(n)
        tensors = {"f64": tensor(values), "f32": tensor(values.astype(np.float32))}
        tensors["bf16"] = tensor(rng.integers(0, 0x3F80, n).astype(np.uint16), "BF16")
        tensors["f8"] = tensor(rng.integers(0, 0x70, n).astype(np.uint8), "F8_E4M3")
        paths.append(save(tmp_path / f"m{i}", tensors))
    options = Options(io=io, dtype=dtype)  # type: ignore[arg-type]
    made: list[bytes] = []
    joined = LeafDigests.joined
    monkeypatch.setattr(LeafDigests, "joined", lambda self: made.append(joined(self)) or made[-1])
    ours = uniform(paths, output=tmp_path / "kernels", options=options).provenance
    assert made or n not in (600, 4096, 12_345), "kernels took part"
    verify(tmp_path / "kernels")
    monkeypatch.setattr(reduce, "find_mixer", lambda source, output: None)
    numpys = uniform(paths, output=tmp_path / "numpy", options=options).provenance
    assert ours.tensors == numpys.tensors
    assert [each.digest for each in ours.ingredients] == [
        each.digest for each in numpys.ingredients
    ]
    # Planted fault: an element more or less is another digest.
    with (tmp_path / "kernels" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(VerificationError, match="f8"):
        verify(tmp_path / "kernels")
