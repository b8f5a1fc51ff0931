"""The digests of a leaf in the making, in memory where compiled kernels go on with them.

Each is an xxh3-128. xxhash's library keeps its states to itself; ours (`xxh3`) are for bytes that
lie in a cache just then, as they are summed there. Where the library digests them, each byte comes
from memory a second time: that took a quarter to a third of a soup on Intel.
"""

from __future__ import annotations

from streamsoup.kernels.constants import SECRET_NBYTES, STATE_NBYTES
from streamsoup.system.buffers import address_of

__all__ = ["SECRET", "LeafDigests"]

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""What xxh3 mixes into its input where no other secret is given (its specification)."""

assert len(SECRET) == SECRET_NBYTES

_START = b"".join(
    word.to_bytes(8, "little")
    for word in (
        *(0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9),
        *(0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1),
    )
)
"""The eight sums before the first byte."""

_SIZE = 16


class LeafDigests:
    """The digests of one leaf: one for each ingredient, and one for the soup."""

    def __init__(self, k: int) -> None:
        """Begin the digests of `k` ingredients, and of the soup."""
        self._states = memoryview(bytearray(_START * (k + 1)))

    def address(self, i: int) -> int:
        """Return the address of the state of ingredient `i`; those of the others follow.

        The soup's is that after the last ingredient's, which comes last in whatever call ends it.
        """
        return address_of(self._states[STATE_NBYTES * i :])

    def joined(self) -> bytes:
        """Return the digests once all bytes were digested: the soup's, then each ingredient's."""
        begins = range(0, len(self._states), STATE_NBYTES)
        # A digest is written with its highest byte first.
        *taken, made = (bytes(self._states[at : at + _SIZE])[::-1] for at in begins)
        return b"".join([made, *taken])
