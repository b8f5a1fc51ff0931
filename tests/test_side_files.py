"""What lies beside the weights goes along: configuration, tokenizer, template; no weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import as_hub_snapshot, command, save, tensor

from streamsoup import Options, uniform
from streamsoup.errors import FormatError, MismatchError
from streamsoup.formats import configs, side_files
from streamsoup.formats.ingredients import open_ingredients
from streamsoup.formats.meaning import check_quantised
from streamsoup.formats.side_files import gather_side_files
from streamsoup.tensors import DTYPES

MODEL = {"w": tensor(np.ones(3, np.float32))}
MADE = ("model.safetensors", "README.md", "streamsoup.json")
KEPT = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
    *("LICENSE", "modeling_custom.py", "1_Pooling/config.json", "preprocessor_config.json"),
)
LEFT = (
    *("pytorch_model.bin", "model.gguf", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"),
    *("training_args.bin", "trainer_state.json", "README.md", "streamsoup.json", ".gitattributes"),
    *("onnx/model.onnx", "onnx/model.onnx_data", "flax_model.msgpack", "tf_model.h5"),
    *("checkpoint-500/config.json", "checkpoint-500/model.safetensors", "runs/events.out.1"),
    *("lora/adapter_model.safetensors", "lora/config.json", ".cache/huggingface/x.json"),
    *("run.json", "all_results.json", "results.json", "metrics.json", "metrics.csv", "logits.npy"),
    *("eval/similarity_evaluation_sts-dev_results.csv", "hparams.yaml", "random_states_0.pkl"),
)


def fill(folder: Path, names: tuple[str, ...], text: str = "{}") -> Path:
    """Make a checkpoint folder with these files."""
    save(folder, MODEL)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return folder


def names_of(folder: Path) -> set[str]:
    """List the files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_side_files_go_along_and_weights_do_not(tmp_path: Path) -> None:
    """Everything that makes the model work is copied; weights and training state stay behind."""
    a = fill(tmp_path / "a", KEPT + LEFT)
    _, (warning, passed_over) = gather_side_files(open_ingredients([a]), None)
    assert "left out pytorch_model.bin, as there is model.safetensors" in passed_over
    assert warning.endswith("copy it there, or a soup of it: lora, onnx")  # the rest is familiar
    uniform([a, a], output=tmp_path / "out")
    assert names_of(tmp_path / "out") == {*KEPT, *MADE}
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\n")
    for name in KEPT:
        assert (tmp_path / "out" / name).read_bytes() == (a / name).read_bytes()


def test_links_are_followed_into_plain_files(tmp_path: Path) -> None:
    """Files of a hub snapshot, which are links, arrive as plain files, with modes by the umask."""
    save(tmp_path / "a", MODEL)
    (tmp_path / "a" / "config.json").write_text("{}")
    snapshot = as_hub_snapshot(tmp_path / "a", tmp_path / "cache")
    os.chmod(snapshot / "config.json", 0o400)
    before = os.umask(0o027)
    try:
        uniform([snapshot], output=tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert path.is_file()
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o640


def test_a_lone_file_brings_no_side_files(tmp_path: Path) -> None:
    """A file given by itself may lie anywhere: what is beside it is not taken, and that is said."""
    a = fill(tmp_path / "a", ("config.json",))
    ran = command("uniform", a / "model.safetensors", "-o", tmp_path / "out")
    assert names_of(tmp_path / "out") == set(MADE)
    assert "is a lone file, so what lies beside it, such as config.json, is not" in ran.stderr
    state = "import torch, streamsoup; streamsoup.uniform([{'w': torch.ones(2)}], output='state')"
    ran = subprocess.run(
        [sys.executable, "-c", state], cwd=a, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    (a / "config.json").unlink()
    ran = command("uniform", a / "model.safetensors", "-o", tmp_path / "other")
    assert ran.stderr == ""


def test_differences_between_ingredients_are_said(tmp_path: Path) -> None:
    """Side files that differ, or are in one ingredient only, give a warning that names them."""
    a, b = fill(tmp_path / "a", ("config.json", "only_a.txt", "x\x1b")), tmp_path / "b"
    fill(b, ("config.json", "x\x1b"), '{"hidden_dropout":1, "_name_or_path": "x"}')
    save(b, {"w": tensor(np.arange(3, dtype=np.float32))})
    wanted = (
        f"side files of {b} differ from those of {a}, which are used: "
        "config.json (hidden_dropout 1 and nothing), only_a.txt, x\\x1b"
    )
    ran = command("uniform", a, b, "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr) == (0, f"warning: {wanted}\n")
    ran = command("uniform", a, b, "-o", tmp_path / "out3", "--json", "-q")
    assert json.loads(ran.stdout)["warnings"] == [wanted]
    quiet = command("uniform", a, b, "-o", tmp_path / "out2", "--quiet")
    assert quiet.stderr == ""
    same = fill(tmp_path / "c", ("config.json", "only_a.txt", "x\x1b"))
    assert gather_side_files(open_ingredients([a, same]), None)[1] == []


def test_the_configuration_names_the_new_dtype(tmp_path: Path) -> None:
    """With --dtype, config.json says so under the key it uses, and is otherwise as it was."""
    for key in ("torch_dtype", "dtype"):
        config = {"hidden": 3, key: "float32", "name": "é"}
        a = save(tmp_path / key, MODEL)
        (a / "config.json").write_text(json.dumps(config))
        uniform([a, a], output=tmp_path / f"out-{key}", options=Options(dtype="bf16"))
        found = json.loads((tmp_path / f"out-{key}" / "config.json").read_text())
        assert found == config | {key: "bfloat16"}
    files, _ = gather_side_files(open_ingredients([a]), None)
    assert files[0].content is None


def test_the_parts_of_a_model_name_the_new_dtype_too(tmp_path: Path) -> None:
    """A part loaded by itself goes by its own dtype; one that says null goes by the whole."""

    def config(dtype: str) -> dict[str, object]:
        deeper = {"deeper_config": {"torch_dtype": dtype, "n": 1}}
        parts = {"text_config": {"dtype": dtype} | deeper, "vision_config": {"dtype": None}}
        return {"dtype": dtype, "other": {"dtype": "float16"}} | parts

    a = save(tmp_path / "a", MODEL)
    (a / "config.json").write_text(json.dumps(config("float16")))
    uniform([a, a], output=tmp_path / "out", options=Options(dtype="f32"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config("float32")


def test_what_training_leaves_is_no_side_file(tmp_path: Path) -> None:
    """Shards of FSDP, optimizers and metrics of one run; the code and data of a model go along."""
    left = ("latest", "zero_to_fp32.py", "train_results.json", "optimizer.pt", "scheduler.pt")
    left += ("optimizer_0/__0_0.distcp", "optimizer_0/.metadata", "pytorch_model_fsdp_0/x.distcp")
    left += ("rng_state_0.pth", "trainer_state.json", "weights.npz", "run.json", "train.log")
    left += ("events.out.tfevents.17.host", "logits.npy", "test_logits.json", "slurm-17.out")
    kept = ("scheduler.py", "optimizer_utils.py", "mel_filters.npz", "scheduler.json", "x/y.npz")
    a = fill(tmp_path / "a", (*left, *kept))
    files, warnings = gather_side_files(open_ingredients([a]), None)
    assert {file.name for file in files} == set(kept)
    assert warnings == []


def test_a_configuration_that_can_be_read_can_be_written(tmp_path: Path) -> None:
    """Half a character, or whatever depth the Python at hand can read, goes along as it came."""
    for text in ('"\\ud800"', *("[" * depth + "]" * depth for depth in range(100, 1600, 100))):
        config = f'{{"dtype": "float32", "x": {text}}}'
        a = save(tmp_path / "a", MODEL)
        (a / "config.json").write_text(config)
        ((file,), _) = gather_side_files(open_ingredients([a]), DTYPES["BF16"])
        if file.content is not None:
            changed = config.replace("float32", "bfloat16")
            assert b"".join(file.content.split()) == "".join(changed.split()).encode()


def test_a_configuration_that_is_not_one_is_copied(tmp_path: Path) -> None:
    """A config.json that is no JSON, no object, nested deep or huge is copied as it is."""
    huge = " " * configs.CONFIG_LIMIT + '{"dtype": ""}'
    for number, text in enumerate(("{", "[1]", "[" * 100_000, huge)):
        a = save(tmp_path / f"a{number}", MODEL)
        (a / "config.json").write_text(text)
        files, _ = gather_side_files(open_ingredients([a]), DTYPES["BF16"])
        assert [file.content for file in files] == [None]


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    """A configuration with quantization_config, in any ingredient, is refused, named."""
    a, b = fill(tmp_path / "a", ("config.json",)), fill(tmp_path / "b", ("config.json",))
    (b / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    for key in ('{"quantization_config": {"bits": 4}}', '{"a": {"quantization_config": [1]}}'):
        (b / "config.json").write_text(key)
        with pytest.raises(MismatchError, match=rf"^{b}/config\.json: has .*quantization_config"):
            uniform([a, b], output=tmp_path / "out")
    (b / "config.json").unlink()
    (b / "quantize_config.json").write_text("{}")
    with pytest.raises(MismatchError, match=rf"^{b}/quantize_config\.json: is there, so the model"):
        check_quantised(open_ingredients([a, b]))


def test_folders_in_the_place_of_files_of_a_soup(tmp_path: Path) -> None:
    """A folder named like the provenance, a shard or an index is left out, and named."""
    folders = ("Other.SAFETENSORS", "README.md", "other.index.json", "streamsoup.json")
    a = fill(tmp_path / "a", ("config.json", *(f"{name}/x.txt" for name in folders)))
    (_, (warning,)) = gather_side_files(open_ingredients([a]), None)
    assert warning.endswith(": Other.SAFETENSORS, README.md, other.index.json, streamsoup.json")
    uniform([a, a], output=tmp_path / "out")
    assert names_of(tmp_path / "out") == {"config.json", *MADE}


def test_strange_side_files_never_hang(tmp_path: Path) -> None:
    """FIFOs, devices, dangling links and linked folders are passed over, and named once."""
    a = fill(tmp_path / "a", ("x.txt", "config.json"), "")
    b = save(tmp_path / "b", MODEL)
    for folder, names in ((a, ("pipe.txt",)), (b, ("x.txt", "config.json"))):
        for name in names:
            os.mkfifo(folder / name)
    (a / "zero").symlink_to("/dev/zero")
    (a / "gone").symlink_to("nowhere")
    (a / "self").symlink_to(".")
    (a / "sub").mkdir()
    (a / "sub" / "tokenizer.json").symlink_to("../../blobs/pruned")
    (tmp_path / "elsewhere").mkdir()
    (a / "1_Pooling").symlink_to("../elsewhere")
    (a / ".hidden").symlink_to("nowhere")
    files, warnings = gather_side_files(open_ingredients([a, b]), DTYPES["BF16"])
    assert [file.name for file in files] == ["config.json", "x.txt"]
    assert warnings == [
        f"{a}: left out what may be weights of another model; if the soup needs it, copy it there, "
        "or a soup of it: self",
        f"{a}: left out what is neither a plain file nor a link to one in this folder; "
        "if the soup needs it, copy it there: 1_Pooling, gone, pipe.txt, zero, sub/tokenizer.json",
        f"side files of {b} differ from those of {a}, which are used: config.json, x.txt",
    ]


@pytest.mark.parametrize("name", ["scandir", "stat", "open"])
def test_what_cannot_be_looked_at_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What a failing disk does not show is never taken for something that is not there."""
    a = fill(tmp_path / "a", ("config.json", "tokenizer/vocab.txt"))
    ingredients = open_ingredients([a])
    real = getattr(os, name)
    hidden = {"scandir": "tokenizer", "stat": "vocab.txt", "open": "config.json"}[name]

    def failing(path: str, *arguments: object, **named: object) -> object:
        if os.path.basename(path) == hidden:
            raise OSError(5, "Input/output error", path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, name, failing)
    with pytest.raises(FormatError, match=rf"^{a}/.*{hidden}: cannot be .*Input/output error"):
        check_quantised(ingredients) if name == "open" else gather_side_files(ingredients, None)


def test_what_cannot_be_noted_is_refused_early(tmp_path: Path) -> None:
    """A side file whose name is not Unicode is refused before the work, named."""
    a = save(tmp_path / "a", MODEL)
    with open(os.fsencode(a) + b"/x\xff.txt", "wb"):
        pass
    with pytest.raises(FormatError, match=r"x\\udcff\.txt: the name of this side file"):
        gather_side_files(open_ingredients([a]), None)


def test_huge_files_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large for a configuration or a tokenizer is not copied, and a warning says so."""
    monkeypatch.setattr(side_files, "LARGEST", 100)
    a = fill(tmp_path / "a", ("config.json", "data.csv"))
    (a / "data.csv").write_text("x" * 101)
    files, warnings = gather_side_files(open_ingredients([a]), None)
    assert [file.name for file in files] == ["config.json"]
    assert warnings == [f"{a}/data.csv: left out, too large for a side file"]


def test_weights_in_folders_are_left_out_and_named(tmp_path: Path) -> None:
    """A part of the model in a folder of its own is not lost unsaid; checkpoints of a run are."""
    parts = ("2_Dense/model.safetensors", "2_Dense/config.json", "deep/down/pytorch_model.bin")
    parts += ("onnx/config.json", "onnx/Model.ONNX", "vae/config.json", "vae/weights.pth")
    a = fill(tmp_path / "a", ("config.json", *parts, "checkpoint-5/model.safetensors"))
    files, (warning,) = gather_side_files(open_ingredients([a]), None)
    assert [file.name for file in files] == ["config.json"]
    assert warning.startswith(f"{a}: left out what may be weights of another model; if the soup")
    assert warning.endswith(": 2_Dense, onnx, vae, deep/down")
    for name in ("spk2info.pt", "Vocab.bin", "speech_tokenizer.onnx"):
        (a / name).write_text("")
    _, (warning,) = gather_side_files(open_ingredients([a]), None)
    assert warning.endswith(": 2_Dense, onnx, vae, Vocab.bin, speech_tokenizer.onnx and 2 more")


def test_a_side_file_that_vanishes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A side file lost between plan and copy stops the run before the weights, named."""
    from streamsoup.output import make

    a = fill(tmp_path / "a", ("config.json",))
    gather = make.gather_side_files

    def gathering(*arguments: object, **settings: object) -> object:
        found = gather(*arguments, **settings)  # type: ignore[arg-type]
        (a / "config.json").unlink()
        return found

    monkeypatch.setattr(make, "gather_side_files", gathering)
    with pytest.raises(FormatError, match=rf"^{a}/config\.json: cannot be copied: No such file"):
        uniform([a], output=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_a_quantised_model_beside_a_lone_file_is_refused(tmp_path: Path) -> None:
    """Whether side files are copied or not."""
    a, b = fill(tmp_path / "a", ()), fill(tmp_path / "b", ("config.json",))
    (b / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    with pytest.raises(MismatchError, match="the model is quantised"):
        uniform([a / "model.safetensors", b], output=tmp_path / "out")


def test_side_files_that_were_never_fetched_are_named(tmp_path: Path) -> None:
    """A pointer in the place of a tokenizer goes along, and its content is asked for."""
    a = fill(tmp_path / "a", ("config.json", "tokenizer.json"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (a / "tokenizer.json").write_text(pointer)
    files, (warning,) = gather_side_files(open_ingredients([a]), None)
    assert [file.name for file in files] == ["config.json", "tokenizer.json"]
    assert warning.endswith("or put the content beside the soup: tokenizer.json")
