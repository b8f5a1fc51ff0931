"""CRC-32 by carry-less products, for x86-64: as fast as bytes come from memory.

A CRC is a remainder: bytes are the coefficients of a polynomial over GF(2), modulo another of
degree 32. So 16 bytes that lie d bits before others may be replaced by a product that has the same
remainder, and is added to those: multiply their halves by x^(d+32) and x^(d-32), each modulo the
polynomial. Eight lanes of 16 bytes are folded onto the next 128 bytes so, until 128 are left, whose
CRC is that of all.

Source: Gopal, Ozturk, Guilford et al., "Fast CRC Computation for Generic Polynomials Using
PCLMULQDQ Instruction", Intel 2009.

It is written for LLVM itself: numba has no such product, and takes half a second to import.
"""

# llvmlite has no types.
# mypy: disable-error-code="no-untyped-call,import-untyped,no-any-return"

from __future__ import annotations

from typing import Any

__all__ = ["LANES_NBYTES", "compile_folding", "constants"]

LANES_NBYTES = 128
"""Bytes that are folded at once: enough lanes that no product waits for another."""

_POLYNOMIAL = 0xEDB88320
"""That of zip, gzip and Ethernet, without its highest coefficient; that of x^0 is bit 31."""

_SYMBOL = "streamsoup_crc32_folded"


def constants() -> tuple[int, int]:
    """Return what the lower and the upper half of a lane are multiplied by: 33 bits each."""
    distance = 8 * LANES_NBYTES
    return _power(distance + 32) << 1, _power(distance - 32) << 1


def _power(n: int) -> int:
    """Return x^n modulo the polynomial; the coefficient of x^0 is bit 31."""
    value = 1 << 31
    for _ in range(n):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


def compile_folding() -> tuple[str, bytes]:
    """Return a symbol and its object file: ``folded(address, nbytes, first, out) -> 0``.

    It folds `nbytes`, a positive multiple of `LANES_NBYTES`, whose first four are first added to
    `first`, into the `LANES_NBYTES` at address `out`. Raises `ImportError` on other processors.
    """
    import llvmlite.binding as llvm

    if not llvm.get_host_cpu_features().get("pclmul"):
        raise ImportError("LLVM finds no carry-less products here")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static",
        codemodel="large",  # constants by whole addresses: `linking` knows no others
    )
    module = llvm.parse_assembly(str(_module()))
    module.verify()
    return _SYMBOL, machine.emit_object(module)


def _module() -> Any:
    from llvmlite import ir

    word, lane = ir.IntType(64), ir.VectorType(ir.IntType(64), 2)
    n_lanes = LANES_NBYTES // 16
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(word, [word] * 4), _SYMBOL)
    address, nbytes, first, out = function.args
    product = ir.Function(
        module, ir.FunctionType(lane, [lane, lane, ir.IntType(8)]), "llvm.x86.pclmulqdq"
    )
    by = ir.Constant(lane, list(constants()))
    lower, upper = ir.Constant(ir.IntType(8), 0x00), ir.Constant(ir.IntType(8), 0x11)

    start = ir.IRBuilder(function.append_basic_block("start"))
    again, end = (function.append_basic_block(name) for name in ("again", "end"))

    def load(builder: Any, at: Any, i: int) -> Any:
        place = builder.inttoptr(builder.add(at, word(16 * i)), lane.as_pointer())
        return builder.load(place, align=1)

    lanes = [load(start, address, i) for i in range(n_lanes)]
    added = start.insert_element(ir.Constant(lane, [0, 0]), first, ir.IntType(32)(0))
    lanes[0] = start.xor(lanes[0], added)
    stop, begin = start.add(address, nbytes), start.add(address, word(LANES_NBYTES))
    start.cbranch(start.icmp_unsigned("<", begin, stop), again, end)

    loop = ir.IRBuilder(again)
    at = loop.phi(word)
    held = [loop.phi(lane) for _ in range(n_lanes)]
    folded = []
    for i, one in enumerate(held):
        products = loop.call(product, [one, by, lower]), loop.call(product, [one, by, upper])
        folded.append(loop.xor(loop.xor(*products), load(loop, at, i)))
    onward = loop.add(at, word(LANES_NBYTES))
    loop.cbranch(loop.icmp_unsigned("<", onward, stop), again, end)
    for phi, before, after in zip([at, *held], [begin, *lanes], [onward, *folded], strict=True):
        phi.add_incoming(before, start.block)
        phi.add_incoming(after, again)

    last = ir.IRBuilder(end)
    results = [last.phi(lane) for _ in range(n_lanes)]
    for phi, before, after in zip(results, lanes, folded, strict=True):
        phi.add_incoming(before, start.block)
        phi.add_incoming(after, again)
    for i, phi in enumerate(results):
        place = last.inttoptr(last.add(out, word(16 * i)), lane.as_pointer())
        last.store(phi, place, align=1)
    last.ret(word(0))
    return module
