"""The same numbers have to mean the same: configurations, token ids, masks, and doubtful soups."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import command, load_array, save, save_sharded, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

import streamsoup
from streamsoup import Options, geometry, interpolate, mix, mix_into, slerp, uniform, verify
from streamsoup.engine import reduce
from streamsoup.engine.rules.linear import Linear
from streamsoup.errors import FormatError, MismatchError, NonFiniteError, UnsafePickleError
from streamsoup.formats.configs import changes
from streamsoup.formats.vocabularies import compare_vocabularies
from streamsoup.output.make import make, order
from streamsoup.recipe import Coefficients

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "id2label": {"0": "cat", "1": "dog"},
    "text_config": {"head_dim": 64, "attention_dropout": 0.0},
}


def model(folder: Path, seed: int = 0, config: Any = None, **tensors: Any) -> Path:
    """Save a small model, with a configuration if one is given."""
    rng = np.random.default_rng(seed)
    save(folder, {"w": tensor(rng.standard_normal((4, 5)).astype(np.float32))} | tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def pair(tmp_path: Path, one: Any, other: Any) -> list[Path]:
    """Save two models with these configurations."""
    return [model(tmp_path / "a", 0, one), model(tmp_path / "b", 1, other)]


def warned(paths: list[Path], output: Path, **more: Any) -> tuple[str, ...]:
    """Make a uniform soup, and give its warnings."""
    return uniform(paths, output=output, options=Options(**more)).warnings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads 4 and 8"),
        ({"rope_theta": 5e5}, "rope_parameters.rope_theta 500000.0 and 10000.0"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu" and "silu"'),
        ({"id2label": {"0": "dog", "1": "cat"}}, 'id2label.0 "dog" and "cat"'),
        ({"text_config": {"head_dim": 32}}, "text_config.head_dim 32 and 64"),
        ({"something_new": True}, "something_new true and nothing"),
        ({"architectures": ["X"]}, 'architectures ["X"] and nothing'),
    ],
)
def test_keys_that_change_meaning_are_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """A key that differs is refused with both values, unless the first's is asked for."""
    a, b = pair(tmp_path, CONFIG, CONFIG | change)
    for refused in (
        lambda: uniform([a, b], output=tmp_path / "out"),
        lambda: uniform([a / "model.safetensors", b], output=tmp_path / "out"),
    ):
        with pytest.raises(MismatchError) as error:
            refused()
        assert str(error.value).startswith(f"{b}/config.json and {a}/config.json differ in ")
        assert said in str(error.value)
        assert str(error.value).endswith("or take that of the first with config='first'")
    assert not (tmp_path / "out").exists()
    (warning,) = warned([a, b], tmp_path / "out", config="first")
    assert said in warning
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


def test_every_command_that_makes_a_soup_knows_the_option(tmp_path: Path) -> None:
    """--config first is taken by all commands that refuse without it, plan too."""
    a, b = pair(tmp_path, CONFIG, CONFIG | {"num_attention_heads": 4})
    out = ("-o", tmp_path / "out", "--overwrite")
    for words in (
        ("uniform", a, b, *out),
        ("mix", a, b, "-c", ".5,.5", *out),
        ("interpolate", a, b, *out),
        ("slerp", a, b, *out),
        ("plan", a, b),
    ):
        ran = command(*words)
        assert ran.returncode == 1
        assert "num_attention_heads 4 and 8" in ran.stderr
        assert command(*words, "--config", "first").returncode == 0, words


def test_bookkeeping_is_silent_and_run_time_is_warned_about(tmp_path: Path) -> None:
    """Where a model came from is no word worth; what acts in training or at run time is."""
    silent = {"_name_or_path": "x", "transformers_version": "4", "torch_dtype": "float16"}
    silent |= {"dtype": "float16", "_commit_hash": "0"}
    a, b = pair(tmp_path, CONFIG, CONFIG | silent)
    assert warned([a, b], tmp_path / "o1") == ()
    for key in ("use_cache", "hidden_dropout_prob", "attn_pdrop", "drop_path_rate", "layerdrop"):
        (b / "config.json").write_text(json.dumps(CONFIG | silent | {key: 1}))
        (warning,) = warned([a, b], tmp_path / "o2", overwrite=True)
        assert warning.endswith(f"which are used: config.json ({key} 1 and nothing)")
    nested = CONFIG | {"text_config": {"head_dim": 64, "attention_dropout": 0.5}}
    (b / "config.json").write_text(json.dumps(nested))
    (warning,) = warned([a, b], tmp_path / "o2", overwrite=True)
    assert "text_config.attention_dropout 0.5 and 0.0" in warning


def test_a_base_need_not_know_its_loss(tmp_path: Path) -> None:
    """Trained classifiers of transformers say which loss they had, and their base does not yet."""
    known = CONFIG | {"problem_type": "single_label_classification"}
    for first, other in ((CONFIG, known), (CONFIG | {"problem_type": None}, known)):
        a, b = pair(tmp_path, first, other)
        (warning,) = warned([a, b], tmp_path / "out", overwrite=True)
        assert "problem_type" in warning
        (warning,) = warned([b, a], tmp_path / "out", overwrite=True)
        assert "problem_type" in warning
    a, b = pair(tmp_path, known, CONFIG | {"problem_type": "regression"})
    with pytest.raises(MismatchError, match='problem_type "regression" and "single_label_class'):
        uniform([a, b], output=tmp_path / "two")


def test_both_ways_to_write_rotary_embeddings_are_one() -> None:
    """A model saved by transformers 4 and one saved by 5 agree; another base does not."""
    old = {"rope_theta": 1e4, "rope_scaling": None}
    new = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert changes(old, new) == changes(new, old) == []
    scaled = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2.0}}
    yarn = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}}
    assert changes(scaled, yarn) == []
    assert [c.key for c in changes(scaled, new)] == [
        "rope_parameters.rope_type",
        "rope_parameters.factor",
    ]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2),
        lambda inner: st.dictionaries(st.text("xy", min_size=1, max_size=2), inner, max_size=3),
    )
)
def test_a_configuration_agrees_with_itself_and_with_no_other(value: Any) -> None:
    """No key of a configuration differs from itself; one with another value does."""
    config = {"inner": value}
    assert changes(config, json.loads(json.dumps(config))) == []
    assert len(changes(config, {"inner": value, "z": 1})) == 1


def vocabulary(kind: str, tokens: list[str]) -> bytes:
    """Write a vocabulary file whose tokens have the ids 0, 1 and so on."""
    ids = {token: i for i, token in enumerate(tokens)}
    if kind == "tokenizer.json":
        return json.dumps({"model": {"vocab": ids, "merges": ["a b"]}, "padding": None}).encode()
    if kind == "unigram":
        return json.dumps({"model": {"vocab": [[token, -1.5] for token in tokens]}}).encode()
    if kind in ("vocab.json", "added_tokens.json"):
        return json.dumps(ids).encode()
    if kind == "tokenizer_config.json":
        added = {str(i): {"content": token, "lstrip": False} for i, token in enumerate(tokens)}
        return json.dumps({"added_tokens_decoder": added, "chat_template": "x"}).encode()
    if kind == "vocab.txt":
        return "\n".join(tokens).encode()
    if kind == "qwen.tiktoken":
        lines = [f"{base64.b64encode(token.encode()).decode()} {i}" for token, i in ids.items()]
        return "\n".join(lines).encode()
    pieces = b""
    for token in tokens:  # a ModelProto of pieces, with their scores
        inner = b"\x0a" + bytes([len(token)]) + token.encode() + b"\x15\0\0\x80\x3f"
        pieces += b"\x0a" + bytes([len(inner)]) + inner
    return pieces + b"\x12\x02\x08\x01"


KINDS = (
    *("tokenizer.json", "unigram", "vocab.json", "added_tokens.json", "tokenizer_config.json"),
    *("vocab.txt", "qwen.tiktoken", "tokenizer.model"),
)
TOKENS = ["<unk>", "the", "cat", "sat", "mat"]


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_token_ids_are_refused_whatever_is_asked_for(kind: str, tmp_path: Path) -> None:
    """Two tokens that changed places are refused; so is a renamed one, but not with first."""
    a, b = pair(tmp_path, CONFIG, CONFIG)
    name = "tokenizer.json" if kind == "unigram" else kind
    (a / name).write_bytes(vocabulary(kind, TOKENS))
    (b / name).write_bytes(vocabulary(kind, ["<unk>", "the", "sat", "cat", "mat"]))
    for config in ("same", "first"):
        with pytest.raises(MismatchError, match=r"have other token ids: token .* has id \d and"):
            warned([a, b], tmp_path / "out", config=config)
    (b / name).write_bytes(vocabulary(kind, ["<unk>", "the", "cat", "sat", "<pad>"]))
    with pytest.raises(MismatchError, match=r"id 4 is .* in one only.*config='first'"):
        warned([a, b], tmp_path / "out")
    assert warned([a, b], tmp_path / "out", config="first")
    (b / name).write_bytes(vocabulary(kind, [*TOKENS, "<pad>"]))
    assert any(name in warning for warning in warned([a, b], tmp_path / "out2"))
    assert compare_vocabularies(str(a / name), str(b / name)) is None


def test_what_is_no_vocabulary_never_ends_in_an_error(tmp_path: Path) -> None:
    """Damaged, nested, huge or strange files of those names only differ."""
    good = tmp_path / "good"
    for kind in KINDS:
        good.mkdir(exist_ok=True)
        name = "tokenizer.json" if kind == "unigram" else kind
        (good / name).write_bytes(vocabulary(kind, TOKENS))
        for bad in (
            b"",
            b"{",
            b"[" * 10_000,
            b"\xff" * 99,
            b"\x0a\xff\xff",
            b'{"a": 1e9}',
            b"\n\n",
        ):
            (tmp_path / name).write_bytes(bad)
            found = compare_vocabularies(str(good / name), str(tmp_path / name))
            assert found is None or not found.moved
        (tmp_path / name).write_bytes(b'{"far": 99999999999, "below": -1}')
        compare_vocabularies(str(tmp_path / name), str(good / name))


def test_doubtful_soups_warn_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is empty, zero, given twice or the same as another is named, and logged."""
    a, b = model(tmp_path / "a", 0), model(tmp_path / "b", 1)
    same = model(tmp_path / "same", 0)
    zero = save(tmp_path / "zero", {"w": tensor(np.zeros((4, 5), np.float32))})
    (tmp_path / "link").symlink_to(a)
    with caplog.at_level(logging.WARNING, "streamsoup"):
        (twice,) = warned([a, b, a], tmp_path / "o1")
        assert twice == f"{a} is given more than once, and counts each time"
        (linked,) = warned([a, b, tmp_path / "link"], tmp_path / "o2")
        assert linked.startswith(f"{a} is given more than once, also as {tmp_path / 'link'}")
        (alike,) = warned([a, b, same], tmp_path / "o3")
        assert alike.endswith(f"each counts again: {a}, {same}")
        (zeros,) = warned([a, b, zero], tmp_path / "o4")
        assert zeros == f"{zero}: all its weights are zero; leave it out"
        empty = {"e": tensor(np.zeros(0, np.float32))}
        paths = [model(tmp_path / name, i, **empty) for i, name in enumerate("cd")]
        (lost,) = warned(paths, tmp_path / "o5")
        assert "1 tensor without elements in all ingredients: e; " in lost
        assert "zero_to_fp32.py" in lost
    assert [r.getMessage() for r in caplog.records] == [twice, linked, alike, zeros, lost]
    assert warned([a, b], tmp_path / "o6") == ()
    ran = command("uniform", a, same, "-o", tmp_path / "o7", "--json", "-q")
    assert json.loads(ran.stdout)["warnings"] == [
        f"the same in all tensors, bit for bit, so that each counts again: {a}, {same}"
    ]


def test_a_tie_over_two_different_tensors_is_named(tmp_path: Path) -> None:
    """A configuration that ties what differs is warned about; what is the same is not."""
    rows = [np.full((3, 2), i, np.float32) for i in range(4)]
    for nested in (False, True):
        tied: dict[str, Any] = {"tie_word_embeddings": True}
        config = {"text_config": tied} if nested else tied
        names = "model.embed_tokens.weight", "lm_head.weight"
        paths = [
            save(
                tmp_path / f"{name}{nested}",
                dict(zip(names, map(tensor, (rows[i], rows[i + 1])), strict=True)),
            )
            for i, name in enumerate("ab")
        ]
        for path in paths:
            (path / "config.json").write_text(json.dumps(config))
        (warning,) = warned(paths, tmp_path / f"o{nested}")
        assert "lm_head.weight is tied to model.embed_tokens.weight, but they differ" in warning
        (paths[0] / "config.json").write_text("{}")
        (paths[1] / "config.json").write_text("{}")
        assert warned(paths, tmp_path / f"p{nested}") == ()
    equal = [save(tmp_path / f"e{i}", dict.fromkeys(names, tensor(rows[i + 1]))) for i in range(2)]
    for path in equal:
        (path / "config.json").write_text(json.dumps(tied))
    assert warned(equal, tmp_path / "eq") == ()


def test_slerp_of_opposites_is_named(tmp_path: Path) -> None:
    """Two exact opposites have no way between them on the sphere: zero results, and is said."""
    w = np.arange(1, 7, dtype=np.float32)
    v = np.ones(3, np.float32)
    a = save(tmp_path / "a", {"w": tensor(w), "v": tensor(v)})
    b = save(tmp_path / "b", {"w": tensor(-w), "v": tensor(2 * v)})
    soup = slerp([a, b], [1, 1], output=tmp_path / "out")
    assert not load_array(tmp_path / "out", "w").any()
    (warning,) = soup.warnings
    assert "1 tensor pointing exactly opposite ways" in warning
    assert warning.endswith(": w")


def mask() -> np.ndarray[Any, Any]:
    """Return a causal mask with −inf above the diagonal, and a few other values."""
    full = np.zeros((700, 800), np.float32)
    full[np.triu_indices(700, 1, 800)] = -np.inf
    full[5, 0] = 0.1
    return full


@pytest.mark.parametrize("dtype", ["same", "bf16", "f64"])
@pytest.mark.parametrize("coefficients", [(0.5, 0.25, 0.25), (2.0, -1.0, 0.0), (0.0, 1.0, 0.0)])
def test_equal_masks_are_kept(
    dtype: str, coefficients: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that is the same in all keeps its infinities, however blocks and digests are made."""
    monkeypatch.setattr(reduce, "COMPILE_NBYTES", 0)
    full = mask()
    paths = [model(tmp_path / name, i, mask=tensor(full)) for i, name in enumerate("abc")]
    made = []
    for number, more in enumerate(({}, {"threads": 3, "memory": "260MB"}, {"io": "read"})):
        out = tmp_path / f"out{number}"
        mix(paths, coefficients, output=out, options=Options(dtype=dtype, **more))  # type: ignore[arg-type]
        assert verify(out).rederived
        made.append((out / "model.safetensors").read_bytes())
        if dtype != "bf16":
            found = load_array(out, "mask")
            assert np.isneginf(found[np.isneginf(full)]).all()
            assert np.allclose(found[np.isfinite(full)], full[np.isfinite(full)])
    assert made[0] == made[1] == made[2]


def test_masks_that_differ_or_are_scaled_are_refused(tmp_path: Path) -> None:
    """One other byte, or coefficients that do not sum to 1, and infinities stop the run."""
    full = mask()
    other = full.copy()
    other[-1, 0] = 7
    a, b, c = (
        model(tmp_path / name, i, mask=tensor(each))
        for i, (name, each) in enumerate({"a": full, "b": full, "c": other}.items())
    )
    for refused in (
        lambda: uniform([a, b, c], output=tmp_path / "out"),
        lambda: mix([a, b], [1.0, 1.0], output=tmp_path / "out"),
        lambda: mix([a], [0.5], output=tmp_path / "out"),
    ):
        with pytest.raises(NonFiniteError, match=r"mask: holds -inf at \[0, 1\]"):
            refused()
    lone = model(tmp_path / "n", 0, x=tensor(np.array([1, np.nan], np.float32)))
    with pytest.raises(NonFiniteError, match="x: holds nan"):
        uniform([lone], output=tmp_path / "out")
    uniform([a], output=tmp_path / "one")
    assert (load_array(tmp_path / "one", "mask") == full).all()


def test_angles_pass_over_equal_masks(tmp_path: Path) -> None:
    """Geometry and slerp count a mask that is the same in all as nothing, and slerp keeps it."""
    full = mask()
    paths = [model(tmp_path / name, i, mask=tensor(full)) for i, name in enumerate("ab")]
    plain = [model(tmp_path / f"p{name}", i) for i, name in enumerate("ab")]
    found, wanted = geometry(paths), geometry(plain)
    assert np.array_equal(found.total.distances, wanted.total.distances)
    slerp(paths, [1, 2], output=tmp_path / "out")
    assert (load_array(tmp_path / "out", "mask") == full).all()
    interpolate(paths[0], paths[1], 2.0, output=tmp_path / "out2")
    assert (load_array(tmp_path / "out2", "mask") == full).all()


@pytest.mark.parametrize("base", [False, True])
def test_means_on_spheres_keep_equal_masks(base: bool, tmp_path: Path) -> None:
    """A mask is kept, and is not told to have no mean, as opposites and a zero task vector are."""
    full = mask()
    pole = np.arange(1, 9, dtype=np.float32)
    paths = [
        model(tmp_path / each, i, mask=tensor(full), pole=tensor(pole * (1 - 2 * (i == 1))))
        for i, each in enumerate("abc")
    ]
    made: Any = []
    for method in (
        lambda **to: streamsoup.nuslerp(paths[1:], [0.7, 0.3], row_wise=True, **to),
        lambda **to: streamsoup.nuslerp(paths[1:], [0.7, 0.3], **to),
        lambda **to: streamsoup.karcher(paths[1:], **to),
        lambda **to: streamsoup.multislerp(paths[1:], **to),
    ):
        for options in (Options(dtype="f64"), Options(dtype="f64", threads=3, memory="260MB")):
            out = tmp_path / str(len(made))
            soup = method(output=out, options=options, base=paths[0] if base else None)
            found = load_array(out, "mask")
            assert np.isneginf(found[np.isneginf(full)]).all()
            assert np.allclose(found[np.isfinite(full)], full[np.isfinite(full)])
            straight = [each for each in soup.warnings if "the straight mean" in each]
            assert all(each.endswith(": pole") for each in straight)
            assert len(straight) == (len(made) > 1)  # rows with no angle are not told
            assert verify(out).rederived
            made.append(found.tobytes())
    assert made[::2] == made[1::2]


@pytest.mark.parametrize("memory", [None, "260MB"])
@pytest.mark.parametrize("name", ["ties", "dare", "breadcrumbs", "della", "sce", "ram", "nearswap"])
def test_merges_copy_equal_masks(name: str, memory: Any, tmp_path: Path) -> None:
    """A mask is copied to the bit, the other tensors are those of a merge without it."""
    full = mask()
    full[5, 0], full[6, 0] = np.inf, -0.0
    paths = [model(tmp_path / each, i, mask=tensor(full)) for i, each in enumerate("abc")]
    plain = [model(tmp_path / f"p{each}", i) for i, each in enumerate("abc")]
    more: dict[str, list[Any]] = {"sce": [], "ram": [], "nearswap": [0.1]}
    given = slice(1, 2) if name == "nearswap" else slice(1, 3)
    for folders, out in ((paths, "out"), (plain, "wanted")):
        getattr(streamsoup, name)(
            folders[given],
            *more.get(name, [0.5]),
            base=folders[0],
            output=tmp_path / out,
            options=Options(memory=memory),
        )
    assert verify(tmp_path / "out").rederived
    found = load_array(tmp_path / "out", "mask")
    assert np.array_equal(np.isinf(found), np.isinf(full))
    assert np.array_equal(found, full)
    assert np.array_equal(load_array(tmp_path / "out", "w"), load_array(tmp_path / "wanted", "w"))


def test_merges_refuse_masks_that_differ(tmp_path: Path) -> None:
    """One other byte in one ingredient, or in the base, and infinities stop the run."""
    full, other = mask(), mask()
    other[-1, 0] = 7
    a, b, c = (
        model(tmp_path / name, i, mask=tensor(each))
        for i, (name, each) in enumerate({"a": full, "b": full, "c": other}.items())
    )
    for tuned, base in (([b, c], a), ([a, b], c)):
        with pytest.raises(NonFiniteError, match=r"mask: holds -inf at \[0, 1\]"):
            streamsoup.ties(tuned, 0.5, base=base, output=tmp_path / "out")


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_masks_are_kept_by_the_pipeline_of_accelerators_too(block: int, tmp_path: Path) -> None:
    """The bytes of a mask are those of the CPU's soup, whatever the coefficients and blocks."""
    from test_device import ordered_on_host

    paths = [model(tmp_path / name, i, mask=tensor(mask())) for i, name in enumerate("abc")]
    for number, values in enumerate(((1 / 2, 1 / 4, 1 / 4), (2.0, -1.0, 0.0))):
        rule = Linear(Coefficients(values))
        ordered = order(paths, rule, method="mix", options=Options())
        here, there = tmp_path / f"cpu{number}", tmp_path / f"device{number}"
        make(ordered, output=here, options=Options())
        make(ordered_on_host(ordered, block=block), output=there, options=Options())
        files = [(each / "model.safetensors").read_bytes() for each in (here, there)]
        assert files[0] == files[1]
        assert verify(there).rederived


def test_masks_are_kept_in_live_models(tmp_path: Path) -> None:
    """A live mix has the infinities of its ingredients, and the bytes that a soup would have."""
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4, 5))
            self.register_buffer("mask", torch.zeros(700, 800))

    full = mask()
    paths = [model(tmp_path / name, i, mask=tensor(full)) for i, name in enumerate("ab")]
    for values in (None, [2.0, -1.0], [0.0, 1.0]):
        net = Net()
        mix_into(net, paths, values)
        assert np.array_equal(np.isneginf(net.mask.numpy()), np.isneginf(full))
        assert not np.isnan(net.mask.numpy()).any()
        if values is not None:
            mix(paths, values, output=tmp_path / "o", options=Options(overwrite=True))
            assert np.array_equal(load_array(tmp_path / "o", "mask"), net.mask.numpy())
    other = full.copy()
    other[0, 0] = 1
    b = model(tmp_path / "c", 1, mask=tensor(other))
    with pytest.raises(NonFiniteError, match="mask: holds -inf"):
        mix_into(Net(), [paths[0], b])


PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_alone_differs_is_the_cause(prefix: str, tmp_path: Path) -> None:
    """Names that differ by a wrapper's prefix get that cause alone, in either order."""
    w = tensor(np.ones(3, np.float32))
    a = save(tmp_path / "a", {"l.w": w, "h.b": w})
    wrapped = save(tmp_path / "b", {f"{prefix}l.w": w, f"{prefix}h.b": w})
    inside = save(tmp_path / "c", {f"l.{prefix}w": w, "h.b": w})
    for first, other in ((a, wrapped), (wrapped, a), (a, inside)):
        with pytest.raises(MismatchError) as refused:
            uniform([first, other], output=tmp_path / "out")
        assert f"differ by {prefix!r} alone" in str(refused.value)
        assert "another architecture" not in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_tied_copy_in_one_ingredient_is_the_cause(tmp_path: Path) -> None:
    """A head stored beside its embedding in one of them only is named as a tied copy."""
    w = tensor(np.ones((3, 2), np.float32))
    a = save(tmp_path / "a", {"model.embed_tokens.weight": w, "lm_head.weight": w})
    b = save(tmp_path / "b", {"model.embed_tokens.weight": w})
    c = save(tmp_path / "c", {"model.embed_tokens.weight": w, "other.weight": w})
    for pair_ in ([a, b], [b, a]):
        with pytest.raises(MismatchError) as refused:
            uniform(pair_, output=tmp_path / "out")
        assert "likely a tied copy: lm_head.weight beside model.embed_tokens" in str(refused.value)
    for pair_ in ([a, c], [b, c]):
        with pytest.raises(MismatchError, match="another architecture"):
            uniform(pair_, output=tmp_path / "out")


def test_spare_weights_beside_an_index_are_named(tmp_path: Path) -> None:
    """Weights of other files in the folder are named as left out; training folders are not."""
    w = tensor(np.ones(3, np.float32))
    a = save_sharded(tmp_path / "a", [{"x": w}, {"y": w}])
    for name in ("model.fp16", "consolidated", "consolidated.00"):
        save(a, {"x": w}, name=name)
    warnings = warned([a], tmp_path / "out")
    assert [w for w in warnings if "left out" in w] == [
        f"{a}: left out weights that are not part of model.safetensors.index.json: "
        "consolidated.00.safetensors, consolidated.safetensors, model.fp16.safetensors"
    ]


def test_refusals_name_the_line_that_makes_a_checkpoint(tmp_path: Path) -> None:
    """Legacy pickles, DeepSpeed and FSDP folders and Hub ids are refused with a command."""

    def folder(*names: str) -> Path:
        at = tmp_path / names[0].replace("/", "_")
        for name in names:
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).write_text("")
        return at

    for names, phrase in (
        (("zero_to_fp32.py", "latest", "global_step5/x.pt"), "zero_to_fp32.py "),
        (("global_step5/mp_rank_00_model_states.pt", "x.pt"), "--safe_serialization"),
        (("pytorch_model_fsdp_0/__0_0.distcp", "x.pt"), "accelerate merge-weights "),
        (("__0_0.distcp",), "format_utils dcp_to_torch "),
    ):
        with pytest.raises(FormatError, match=phrase):
            uniform([folder(*names)], output=tmp_path / "out")
    for given_ in (folder("pytorch_model.bin"), folder("y") / "model.pt"):
        at = given_ / "pytorch_model.bin" if given_.is_dir() else given_
        at.write_bytes(b"\x80\x02}q\x00.")
        with pytest.raises(UnsafePickleError, match=r"first: python -c .*weights_only=True"):
            uniform([given_], output=tmp_path / "out")
    ran = command("uniform", "org/some-model@v2", "-o", tmp_path / "out", cwd=tmp_path)
    assert "hf download org/some-model --revision v2`" in ran.stderr


def test_the_line_for_pickles_works(tmp_path: Path) -> None:
    """What the refusal says to type makes the tensors of the pickle, tied ones included."""
    torch = pytest.importorskip("torch")
    from streamsoup.formats.conversions import of_pickle

    w = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "it's a model.pt"
    torch.save({"state_dict": {"w": w.t(), "tied": w}}, path)
    import subprocess
    import sys

    line = of_pickle(str(path)).replace("python", sys.executable, 1)
    assert subprocess.run(line, shell=True, check=False).returncode == 0
    made = load_array(tmp_path / "it's a model.safetensors", "w")
    assert (made == w.t().numpy()).all()


def test_the_configuration_of_stacked_layers_is_the_one_that_they_get(tmp_path: Path) -> None:
    """Layers of several checkpoints fit a model of as many layers: their count is theirs."""
    for name, n in (("a", 3), ("b", 3), ("c", 4)):
        layers = {f"model.layers.{i}.w": tensor(np.full(3, float(i), "f4")) for i in range(n)}
        folder = save(tmp_path / name, layers)
        config = {"model_type": "llama", "num_hidden_layers": n}
        (folder / "config.json").write_text(json.dumps(config))
    stack = f"{tmp_path}/a[0:2],{tmp_path}/b[1:3]"
    soup = uniform([stack, tmp_path / "c"], output=tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["num_hidden_layers"] == 4
    assert len(soup.provenance.tensors) == 4
    with pytest.raises(MismatchError):
        uniform([stack, tmp_path / "a"], output=tmp_path / "other")
