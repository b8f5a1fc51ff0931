"""Verify finds every damage: of a shard, its header, the index, a side file, the provenance."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from checkpoints import command, random_model, save, save_sharded, tensor

from streamsoup import Options, mix, uniform, verify
from streamsoup.engine.rules.built_in import BUILT_IN
from streamsoup.errors import RecipeError, StreamsoupError, VerificationError
from streamsoup.recipe import Provenance


def damage(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    whole = bytearray(path.read_bytes())
    whole[at] ^= 1
    path.write_bytes(whole)


@pytest.fixture
def kitchen(tmp_path: Path) -> Path:
    """Make a soup ``out`` of two sharded ingredients with side files."""
    for i in range(2):
        model = random_model(i)
        names = list(model)
        shards = [{n: model[n] for n in names[:3]}, {n: model[n] for n in names[3:]}]
        folder = save_sharded(tmp_path / f"m{i}", shards)
        (folder / "config.json").write_text('{"a": 1}')
        (folder / "sub").mkdir()
        (folder / "sub" / "vocab.txt").write_text("x")
    uniform([tmp_path / "m0", tmp_path / "m1"], output=tmp_path / "out")
    return tmp_path


def test_a_soup_as_it_was_made_passes(kitchen: Path) -> None:
    """Nothing changed: quick and full both pass, and say what they compared."""
    quick = verify(kitchen / "out", quick=True)
    assert (quick.rederived, quick.n_tensors, quick.n_files) == (False, 8, 6)
    full = verify(kitchen / "out")
    assert full.rederived
    assert full.nbytes_read > 2 * quick.nbytes_read
    for options in (Options(threads=1), Options(io="read"), Options(memory="1GB")):
        assert verify(kitchen / "out", options=options).rederived


def test_moved_ingredients_can_be_named(kitchen: Path) -> None:
    """Ingredients that lie elsewhere now are given in order; the wrong order does not pass."""
    for i in range(2):
        (kitchen / f"m{i}").rename(kitchen / f"n{i}")
    with pytest.raises(StreamsoupError, match="m0: no such file"):
        verify(kitchen / "out")
    moved = [kitchen / "n0", kitchen / "n1"]
    assert verify(kitchen / "out", ingredients=moved).rederived
    with pytest.raises(VerificationError, match="is not the one that was used"):
        verify(kitchen / "out", ingredients=moved[::-1])
    with pytest.raises(RecipeError, match="1 ingredient given for a soup of 2"):
        verify(kitchen / "out", ingredients=moved[:1])


def test_any_damaged_byte_is_found(kitchen: Path) -> None:
    """One flipped bit anywhere in a soup fails the quick check, which names the file."""
    out = kitchen / "out"
    rng = np.random.default_rng(0)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    assert len(files) == 7
    for path in files:
        size = path.stat().st_size
        kept = path.read_bytes()
        places = sorted({0, 5, size - 1, *rng.integers(0, size, 25).tolist()} & set(range(size)))
        if path.name == "streamsoup.json":
            # Blanks between words carry nothing; how digests are made is looked at first.
            places = [at for at in places if not kept[at : at + 1].isspace()]
            places.append(kept.index(b"xxh3"))
        for at in places:
            damage(path, at)
            with pytest.raises(StreamsoupError) as found:
                verify(out, quick=True)
            named = path.relative_to(out).as_posix()
            assert named in str(found.value), at
            assert str(found.value).replace("\n", "").isprintable()
            path.write_bytes(kept)
    assert verify(out, quick=True).n_files == 6


def test_every_byte_of_a_provenance_counts(kitchen: Path) -> None:
    """One flipped bit in any word of a provenance, names of fields included, is found."""
    path = kitchen / "out" / "streamsoup.json"
    kept = path.read_bytes()
    assert Provenance.from_json(kept, BUILT_IN).intact
    for at, byte in enumerate(kept):
        if not bytes([byte]).isspace():
            flipped = kept[:at] + bytes([byte ^ 1]) + kept[at + 1 :]
            try:
                assert not Provenance.from_json(flipped, BUILT_IN).intact, at
            except RecipeError:
                pass


@pytest.mark.parametrize("field", ["arithmetic", "digest", "report", "checksum"])
def test_what_a_provenance_does_not_say_is_missed(kitchen: Path, field: str) -> None:
    """A field that is gone is not taken for what it would be by default."""
    path = kitchen / "out" / "streamsoup.json"
    said = json.loads(path.read_text())
    del said[field]
    path.write_text(json.dumps(said))
    with pytest.raises(RecipeError, match=f"missing required field `{field}`"):
        verify(kitchen / "out", quick=True)


def test_weights_beside_the_soup_are_found(kitchen: Path) -> None:
    """A shard that the index does not list may be what somebody loads: it does not pass."""
    save(kitchen / "out", random_model(3), name=".hidden")
    assert verify(kitchen / "out", quick=True).n_files == 6
    save(kitchen / "out", random_model(3), name="consolidated")
    with pytest.raises(VerificationError, match=r": consolidated\.safetensors was not made here;"):
        verify(kitchen / "out", quick=True)


def test_lost_and_strange_files_are_found(kitchen: Path) -> None:
    """A file that is missing, cut, or replaced by a FIFO is named; nothing hangs."""
    out = kitchen / "out"
    shard = "model-00002-of-00002.safetensors"
    for name in ("config.json", "sub/vocab.txt", shard, "model.safetensors.index.json"):
        kept = (out / name).read_bytes()
        (out / name).unlink()
        with pytest.raises(StreamsoupError, match=Path(name).name):
            verify(out, quick=True)
        os.mkfifo(out / name)
        with pytest.raises(StreamsoupError, match=Path(name).name):
            verify(out, quick=True)
        (out / name).unlink()
        (out / name).write_bytes(kept[:-1])
        with pytest.raises(VerificationError, match=Path(name).name):
            verify(out, quick=True)
        (out / name).write_bytes(kept)
    (out / "streamsoup.json").unlink()
    with pytest.raises(RecipeError, match="only a folder made by streamsoup"):
        verify(out, quick=True)
    os.mkfifo(out / "streamsoup.json")
    with pytest.raises(RecipeError, match="cannot be read"):
        verify(out, quick=True)


def test_an_endless_provenance_is_refused(kitchen: Path) -> None:
    """A provenance too large for memory is refused before it is all read, and named."""
    os.truncate(kitchen / "out" / "streamsoup.json", 10**12)
    with pytest.raises(RecipeError, match=r"out/streamsoup\.json: is too large for a provenance"):
        verify(kitchen / "out", quick=True)


def test_a_tensor_added_or_renamed_is_found(kitchen: Path) -> None:
    """A valid checkpoint with other tensors than were made does not pass."""
    out = kitchen / "out"
    shutil.copytree(out, kitchen / "changed")
    for path in (kitchen / "changed").glob("*.safetensors*"):
        path.unlink()
    save(kitchen / "changed", random_model(0, extra=tensor(np.zeros(2, np.float32))))
    with pytest.raises(VerificationError) as found:
        verify(kitchen / "changed", quick=True)
    message = str(found.value)
    assert "extra in model.safetensors was not made here" in message
    assert "model-00001-of-00002.safetensors is missing" in message
    assert "embed.weight in model.safetensors has changed" in message


def test_a_changed_ingredient_is_found_by_the_full_check(kitchen: Path) -> None:
    """One bit of one ingredient: the quick check passes, the full one names it and the tensor."""
    path = kitchen / "m1" / "model-00001-of-00002.safetensors"
    damage(path, path.stat().st_size - 1)
    assert not verify(kitchen / "out", quick=True).rederived
    with pytest.raises(VerificationError) as found:
        verify(kitchen / "out")
    assert f"the ingredient {kitchen}/m1 is not the one that was used" in str(found.value)


def test_a_forged_soup_is_found_by_the_full_check(kitchen: Path) -> None:
    """A sound soup with a sound provenance still has to follow from its ingredients."""
    other = save(kitchen / "m2", random_model(2))
    uniform([kitchen / "m0", other], output=kitchen / "other")
    text = (kitchen / "other" / "streamsoup.json").read_text()
    (kitchen / "m2").rename(kitchen / "gone")
    shutil.copytree(kitchen / "m1", kitchen / "m2")
    assert "m2" in text
    assert not verify(kitchen / "other", quick=True).rederived
    with pytest.raises(VerificationError, match="derives differently from these ingredients"):
        verify(kitchen / "other")


def test_messages_stay_short(kitchen: Path) -> None:
    """However many tensors changed, a page is enough, and the rest is counted."""
    many = {f"t{i:04}": tensor(np.float32(i)) for i in range(300)}
    save(kitchen / "a", many)
    uniform([kitchen / "a"], output=kitchen / "soup")
    path = kitchen / "soup" / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1200:] = bytes(x ^ 1 for x in whole[-1200:])
    path.write_bytes(whole)
    with pytest.raises(VerificationError) as found:
        verify(kitchen / "soup")
    assert len(str(found.value).splitlines()) == 15
    assert "and 288 more" in str(found.value)


def test_the_command_line_says_it_in_words(kitchen: Path) -> None:
    """Exit 0 and a line for a sound soup, 1 and one error for a damaged; --json for machines."""
    sound = command("verify", kitchen / "out")
    assert (sound.returncode, sound.stderr) == (0, "")
    assert sound.stdout.startswith(f"{kitchen}/out is as it was made (8 tensors derived again")
    machine = json.loads(command("verify", kitchen / "out", "--quick", "--json").stdout)
    assert machine["rederived"] is False
    assert machine["n_tensors"] == 8
    damage(kitchen / "out" / "config.json", 0)
    broken = command("verify", kitchen / "out", "--quick")
    assert (broken.returncode, broken.stdout) == (1, "")
    expected = "is not what its provenance says: config.json has changed; restore what has changed"
    assert broken.stderr == f"error: {kitchen}/out: {expected}, or make the soup again\n"


def test_provenance_of_before_rules_still_verifies(tmp_path: Path) -> None:
    """Coefficients lay in the recipe itself once, under another checksum: such soups verify."""
    paths = [save(tmp_path / f"m{i}", {"t": tensor(np.full(9, i, np.float32))}) for i in range(2)]
    soup = mix(paths, [0.1, 0.9], output=tmp_path / "soup")
    where = Path(soup.path) / "streamsoup.json"
    plain = msgspec.json.decode(where.read_bytes())
    rule = plain["recipe"].pop("rule")
    plain["recipe"] = {
        "ingredients": plain["recipe"].pop("ingredients"),
        "coefficients": {"values": rule["coefficients"]["values"]},
        **plain["recipe"],
    }
    plain["checksum"] = xxhash.xxh3_128_hexdigest(msgspec.json.encode(plain | {"checksum": ""}))
    where.write_bytes(msgspec.json.format(msgspec.json.encode(plain), indent=1))
    assert verify(soup.path).rederived
    plain["recipe"]["coefficients"]["values"] = [0.2, 0.8]
    where.write_bytes(msgspec.json.encode(plain))
    with pytest.raises(VerificationError, match=r"streamsoup\.json has changed"):
        verify(soup.path)
