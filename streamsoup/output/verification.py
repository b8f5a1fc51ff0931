"""Verification of a soup against its provenance: compare its digests, and derive it again.

The quick check digests the soup's own bytes and compares them with the recorded digests. The full
check also digests the ingredients, and makes the soup once more without writing it.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Sequence

import msgspec
import xxhash

from streamsoup.engine.budget import memory_budget, plan_memory
from streamsoup.engine.digest import digest_bytes, digest_file
from streamsoup.engine.plan import LEAF, plan_mix
from streamsoup.engine.read import open_reader, will_map
from streamsoup.engine.rules.built_in import BUILT_IN
from streamsoup.errors import (
    FormatError,
    MissingFileError,
    RecipeError,
    VerificationError,
    count,
    printable,
)
from streamsoup.formats.ingredients import AnyIngredient, Ingredient, listed, open_ingredients
from streamsoup.formats.listings import check_component
from streamsoup.formats.remote.addresses import is_address
from streamsoup.formats.shards import Shard
from streamsoup.formats.side_files import pieces
from streamsoup.formats.stored import open_stored
from streamsoup.options import Options, check_options, take
from streamsoup.recipe import ARITHMETIC, DIGEST, PROVENANCE_LIMIT, PROVENANCE_NAME, Provenance
from streamsoup.rule import Rule
from streamsoup.sizes import nbytes_text
from streamsoup.system.schemes import check_local
from streamsoup.tensors import TensorSpec

__all__ = ["Verification", "read_provenance", "verify", "where_they_were"]


class Verification(msgspec.Struct, frozen=True):
    """What was compared, all of it equal."""

    path: str
    n_tensors: int
    n_files: int
    rederived: bool
    """True if the soup was made again from its ingredients, not only digested."""
    nbytes_read: int


def verify(
    path: str | os.PathLike[str],
    *,
    quick: bool = False,
    ingredients: Iterable[AnyIngredient] | None = None,
    rules: Sequence[type[Rule]] = (),
    options: Options = Options(),  # noqa: B008 - frozen
) -> Verification:
    """Check the soup in the folder `path` against its provenance.

    Args:
        path: The folder of the soup.
        quick: Read the soup's own bytes only; otherwise the soup is derived again.
        ingredients: Its ingredients in the same order; None for the recorded paths.
        rules: Types of rules that do not come with the package: code that a provenance names is
            never searched for.
        options: The caller's options.

    Returns:
        What was compared, all of it equal.

    Raises:
        VerificationError: Names all differences.
        RecipeError: There is no provenance, or its rule is unknown.
        StreamsoupError: An ingredient cannot be opened or read.

    Reads the soup once and, unless `quick`, the ingredients once for each pass of the rule. Memory
    is bounded as when the soup was made; writes nothing.
    """
    check_options(options, Options)
    folder = os.fsdecode(path)
    provenance = read_provenance(folder, rules)
    problems: list[str] = []
    nbytes = _check_soup(folder, provenance, problems)
    if not take("bool", "quick", quick) and not problems:
        places = where_they_were(folder, provenance) if ingredients is None else ingredients
        given = listed(places)
        nbytes += _rederive(provenance, given, options, problems)
    if problems:
        raise VerificationError(_bounded(folder, problems))
    n_files = len(provenance.shards) + len(provenance.side_files)
    return Verification(folder, len(provenance.tensors), n_files, not quick, nbytes)


def read_provenance(folder: str, rules: Sequence[type[Rule]] = ()) -> Provenance:
    """Read the provenance of a soup. Raises `RecipeError` if the folder holds none."""
    check_local(folder, RecipeError)
    where = os.path.join(folder, PROVENANCE_NAME)
    text = bytearray()
    try:
        for piece in pieces(where):
            text += piece
            if len(text) > PROVENANCE_LIMIT:
                raise RecipeError("is too large for a provenance")
        return Provenance.from_json(bytes(text), [*BUILT_IN, *rules])
    except OSError as error:
        raise RecipeError(
            f"{printable(where)}: cannot be read ({error.strerror}); "
            "only a folder made by streamsoup can be verified"
        ) from None
    except RecipeError as error:
        raise RecipeError(
            f"{printable(where)}: {error.text}; restore it, or make the soup again"
        ) from None


def _check_soup(folder: str, provenance: Provenance, problems: list[str]) -> int:
    """Compare the soup's own bytes with their digests; return the number of bytes read."""
    if provenance.digest != DIGEST:
        digest = printable(provenance.digest)
        problems.append(f"{PROVENANCE_NAME} has digests of another kind: {digest}")
        return 0
    if not provenance.intact:
        problems.append(f"{PROVENANCE_NAME} has changed")
    for record in provenance.side_files:
        try:
            digest = digest_file(os.path.join(folder, record.name))
        except (OSError, ValueError) as error:
            problems.append(f"{printable(record.name)} cannot be read ({_reason(error)})")
            continue
        if digest != record.digest:
            problems.append(f"{printable(record.name)} has changed")
    nbytes = 0
    found: set[str] = set()
    components = dict.fromkeys(posixpath.dirname(record.name) for record in provenance.shards)
    for component in components or [""]:
        try:
            check_component(component)
            nbytes += _check_component(folder, component, provenance, found, problems)
        except (FormatError, MissingFileError) as error:
            problems.append(error.text)
            return nbytes
    for name in provenance.tensors:
        if name not in found:
            problems.append(f"tensor {printable(name)} is missing")
    return nbytes


def _check_component(
    folder: str, component: str, provenance: Provenance, found: set[str], problems: list[str]
) -> int:
    """Compare the shards in a folder of the soup with their digests; return the bytes read."""
    above = f"{component}/" if component else ""
    soup = open_stored(os.path.join(folder, component) if component else folder)
    opened = {above + name for name in soup.file_names}
    for record in provenance.shards:
        if posixpath.dirname(record.name) == component and record.name not in opened:
            problems.append(f"{printable(record.name)} is missing")
    recorded = {record.name for record in (*provenance.shards, *provenance.side_files)}
    for name in sorted(os.listdir(os.path.join(folder, component))):
        # Shards that were opened are checked below.
        beside = name.endswith(".safetensors") and not name.startswith(".")
        if beside and above + name not in recorded | opened:
            problems.append(f"{printable(above + name)} was not made here")
    nbytes = 0
    for shard in soup.shards:
        try:
            nbytes += _check_shard(shard, above, provenance, found, problems)
        except OSError as error:
            problems.append(f"{_base(shard, above)} cannot be read ({_reason(error)})")
    return nbytes


def _check_shard(
    shard: Shard, above: str, provenance: Provenance, found: set[str], problems: list[str]
) -> int:
    """Compare a shard's header and tensors with their digests; return the number of bytes read.

    The names of the soup begin with `above`, the path of the shard's folder.
    """
    recorded = {record.name: record.digest for record in provenance.shards}
    where = _base(shard, above)
    with open(shard.path, "rb", buffering=0) as opened:
        header = os.pread(opened.fileno(), shard.data_begin, 0)
        if recorded.get(above + os.path.basename(shard.path)) != digest_bytes(header):
            problems.append(f"the header of {where} has changed")
        for spec in shard.header.tensors.values():
            name = above + spec.name
            found.add(name)
            if name not in provenance.tensors:
                problems.append(f"{printable(name)} in {where} was not made here")
            elif provenance.tensors[name] != _digest_tensor(
                opened.fileno(), shard.data_begin, spec
            ):
                problems.append(f"{printable(name)} in {where} has changed")
    return shard.identity.size


def _base(shard: Shard, above: str) -> str:
    return printable(above + os.path.basename(shard.path))


def _digest_tensor(descriptor: int, data_begin: int, spec: TensorSpec) -> str:
    """Digest a tensor where it lies, leaf by leaf, a piece at a time."""
    whole = xxhash.xxh3_128()
    unit = spec.dtype.itemsize if spec.dtype.averaged else 1
    for begin in range(0, spec.nbytes, LEAF * unit):
        leaf = xxhash.xxh3_128()
        end = min(begin + LEAF * unit, spec.nbytes)
        while begin < end:
            part = os.pread(descriptor, min(1 << 20, end - begin), data_begin + spec.begin + begin)
            if not part:
                raise VerificationError(f"{printable(spec.name)} ended while it was being read")
            leaf.update(part)
            begin += len(part)
        whole.update(leaf.digest())
    return whole.hexdigest()


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or printable(error))


def where_they_were(folder: str, provenance: Provenance) -> list[str]:
    """Return the paths of the ingredients. Raises `RecipeError` for tensors in memory."""
    paths = [record.path for record in provenance.ingredients]
    for path in paths:
        if not (os.path.isabs(path) or is_address(path)):
            raise RecipeError(
                f"{printable(folder)}: was made of tensors in memory ({printable(path)}); give "
                "all ingredients again, or compare digests alone (quick)"
            )
    return paths


def _rederive(
    provenance: Provenance,
    given: Sequence[AnyIngredient],
    options: Options,
    problems: list[str],
) -> int:
    """Make the soup again without writing it, and compare; return the number of bytes read."""
    from streamsoup.engine.reducers import reducer_of
    from streamsoup.engine.stream import DigestLedger, Nowhere, run

    if provenance.arithmetic != ARITHMETIC:
        problems.append(f"its arithmetic is another: {printable(provenance.arithmetic)}")
        return 0
    if len(given) != len(provenance.ingredients):
        raise RecipeError(
            f"{count(len(given), 'ingredient')} given for a soup of "
            f"{len(provenance.ingredients)}; give all, in the same order"
        )
    opened = open_ingredients(given, provenance.recipe.reading.reaching_as(options))
    plan = plan_mix(opened, provenance.recipe)
    mapped = will_map(opened, options.io)
    memory = plan_memory(
        plan,
        mapped=mapped,
        threads=options.n_threads,
        budget=memory_budget(plan, options.memory),
    )
    ledger = DigestLedger(plan)
    reader = open_reader(plan, memory, mapped=mapped)
    read = run(
        plan,
        memory,
        reader,
        reducer_of(plan, memory),
        Nowhere(),
        ledger=ledger,
        on_event=options.on_event,
    )
    for i, record in enumerate(provenance.ingredients):
        if ledger.digests.of_ingredient(i) != record.digest:
            problems.append(_changed(opened[i], record.nbytes))
    made = ledger.digests.of_soup()
    for name, digest in provenance.tensors.items():
        if name not in made:
            problems.append(f"{printable(name)} is in none of these ingredients")
        elif made[name] != digest:
            problems.append(f"{printable(name)} derives differently from these ingredients")
    return read.nbytes


def _changed(ingredient: Ingredient, nbytes: int) -> str:
    size = "" if ingredient.nbytes == nbytes else f", and has {nbytes_text(ingredient.nbytes)} now"
    return f"the ingredient {printable(ingredient.name)} is not the one that was used{size}"


_ADVICE = "restore what has changed, or make the soup again"


def _bounded(folder: str, problems: list[str], limit: int = 12) -> str:
    shown = problems[:limit]
    if len(problems) > limit:
        shown.append(f"… and {len(problems) - limit} more")
    if len(shown) == 1:
        return f"{printable(folder)}: is not what its provenance says: {shown[0]}; {_ADVICE}"
    lines = "\n".join([*(f"  {line}" for line in shown), _ADVICE])
    return f"{printable(folder)}: is not what its provenance says:\n{lines}"
