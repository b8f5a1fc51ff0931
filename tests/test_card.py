"""The model card: what the Hub shows of a soup, from names that may come from anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import as_hub_snapshot, command, save, tensor
from markdown_it import MarkdownIt

from streamsoup import Coefficients, Options, mix, plan, ties, uniform, verify
from streamsoup.errors import OutputExistsError, VerificationError
from streamsoup.formats.origins import find_origin
from streamsoup.output.card import escaped

WEIGHTS = {"w": tensor(np.ones(3, "f4")), "n": tensor(np.arange(2))}


def checkpoint(folder: Path, *, card: str = "", config: Any = None) -> Path:
    """Make a checkpoint with a card and a configuration."""
    save(folder, WEIGHTS)
    if card:
        (folder / "README.md").write_text(card)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter of a card, whose values are JSON, and the text after it."""
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = {}
    for line in front.splitlines():
        key, _, value = line.partition(":")
        if line.startswith("- "):
            found[list(found)[-1]].append(json.loads(line[2:]))
        else:
            found[key] = [] if not value else value.strip()
    return {k: json.loads(v) if v[:1] == '"' else v for k, v in found.items()}, body


def rows(body: str) -> list[list[str]]:
    """Return the cells of all tables in a text, as a renderer of Markdown shows them."""
    found: list[list[str]] = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body):
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline" and found and token.level > 3:
            found[-1].append("".join(child.content for child in token.children or ()))
    return found


def test_a_card_says_what_the_soup_was_made_of(tmp_path: Path) -> None:
    """Ingredients, coefficients, method, library and base models stand where the Hub reads them."""
    front = "---\nlibrary_name: timm\nlicense: mit\nbase_model:\n- org/base\n- 'org/second'\n---\n"
    a = checkpoint(tmp_path / "runs" / "checkpoint-5", card=front + "# Stale\n")
    b = checkpoint(tmp_path / "b", card="---\nlicense: mit\nbase_model: org/other\n---\n")
    c = checkpoint(tmp_path / "c", config={"_name_or_path": "org/base", "license": "gpl"})
    mix([a, b, c], [3, 1, 1], output=tmp_path / "soup", normalize=True)
    data, body = read(tmp_path / "soup")
    assert data == {
        "base_model": ["org/base", "org/second", "org/other"],
        "base_model_relation": "merge",
        "library_name": "timm",
        "tags": ["merge", "streamsoup", "mix"],
    }
    assert rows(body)[1:] == [
        ["1", "runs/checkpoint-5", "0.6"],
        ["2", "b", "0.2"],
        ["3", "c", "0.2"],
    ]
    assert "Stale" not in body
    assert str(tmp_path) not in body
    assert "1 tensor that hold" in body


def test_what_all_cards_agree_on_is_kept(tmp_path: Path) -> None:
    """A license and a task that all ingredients name are those of the soup; any other is not."""
    front = "---\nlicense: apache-2.0\npipeline_tag: text-generation\n---\n"
    a = checkpoint(tmp_path / "a", card=front, config={"model_type": "llama"})
    uniform([a, a], output=tmp_path / "soup")
    data, _ = read(tmp_path / "soup")
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "transformers"
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_a_model_of_the_hub_is_its_own_base_model(tmp_path: Path) -> None:
    """A snapshot in the cache of the Hub is called by the id of its model."""
    folder = checkpoint(tmp_path / "a", config={"_name_or_path": "org/else"})
    a = as_hub_snapshot(folder, tmp_path / "models--org--name.v1")
    uniform([a, a], output=tmp_path / "soup")
    data, body = read(tmp_path / "soup")
    assert data["base_model"] == ["org/name.v1"]
    assert rows(body)[1] == ["1", "org/name.v1", "0.5"]


@pytest.mark.parametrize(
    "name", ["outputs/run1", "./x/y", "org/model/more", "/abs/x", "a b/c", "org/checkpoint-500", ""]
)
def test_paths_on_a_disk_are_not_taken_for_models(tmp_path: Path, name: str) -> None:
    """What a configuration was loaded from is a base model only if it looks like one."""
    a = checkpoint(tmp_path / "a", config={"_name_or_path": name})
    assert find_origin(str(a), str(a)).bases == ()


HOSTILE = (
    *("a|b|c", "`x`", "[click](http://evil.example)", "<script>alert(1)</script>", "*bold*"),
    *("https://evil.example", "www.evil.example", "\x1b[2J", "a\nb\n# c", "&amp;", "\\", "a\\|b"),
    *("![x](y)", "~~x~~", "me@evil.example", "| - |", "\u202egnp.exe", "$x$", "---"),
)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_names_are_shown_as_they_are(name: str) -> None:
    """A hostile name is one cell of a table, with no link, no markup and no line of its own."""
    text = f"| a | b |\n|---|---|\n| 1 | {escaped(name)} |\n"
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    assert html.count("<td>") == 2
    for tag in ("<a", "<script", "<em", "<img", "<code", "<del", "<s>", "<h1"):
        assert tag not in html
    if name.isprintable():
        assert rows(text)[1][1] == name.strip()
    assert "://" not in escaped(name)
    assert "www." not in escaped(name)


def test_a_planted_name_is_markup_without_escapes() -> None:
    """The test above can fail: without escapes, a name is a link and two cells."""
    text = "| a | b |\n|---|---|\n| 1 | [x](http://evil.example) |\n"
    assert "<a" in MarkdownIt("commonmark").enable("table").render(text)


def test_hostile_folders_keep_the_card_whole(tmp_path: Path) -> None:
    """Ingredients in folders of hostile names have one row each."""
    names = [name.replace("/", "") for name in HOSTILE]
    names = [name for name in names if name.isprintable() and name != "\\"]
    paths = [checkpoint(tmp_path / f"x{name}") for name in names]
    uniform(paths, output=tmp_path / "soup")
    _, body = read(tmp_path / "soup")
    assert [row[1] for row in rows(body)[1:]] == [f"x{name}" for name in names]


@pytest.mark.parametrize(
    "card",
    [
        "---\nbase_model: !!python/object/apply:os.system ['id']\n---\n",
        "---\nbase_model: 'org/a\n- injected: true'\n---\n",
        "---\nbase_model: [a, b]\nlicense: {x: y}\nlibrary_name: '<b>'\n---\n",
        "---\nbase_model: org/a",
        "---\nbase_model:\n- org/a/b\n- ../../x\n---\n",
        "\x00\xff",
        "---\n" + "a: b\n" * 5000 + "base_model: org/late\n---\n",
        "text before\n---\nbase_model: org/a\n---\n",
    ],
    ids=range(8),
)
def test_hostile_cards_say_nothing(tmp_path: Path, card: str) -> None:
    """Only ids and plain words of a front matter are believed, and no YAML is parsed."""
    a = checkpoint(tmp_path / "a", card=card)
    uniform([a, a], output=tmp_path / "soup")
    data, _ = read(tmp_path / "soup")
    assert data == {"tags": ["merge", "streamsoup", "uniform"]}


def test_cards_that_are_no_files_say_nothing(tmp_path: Path) -> None:
    """A FIFO, a link out of the folder and a huge card are not read."""
    a = checkpoint(tmp_path / "a")
    os.mkfifo(a / "README.md")
    assert find_origin(None, str(a)).bases == ()
    (a / "README.md").unlink()
    (tmp_path / "secret").write_text("---\nbase_model: org/secret\n---\n")
    (a / "README.md").symlink_to(tmp_path / "secret")
    assert find_origin(None, str(a)).bases == ()
    (a / "README.md").unlink()
    (a / "README.md").write_text("---\nbase_model: org/a\n---\n" + " " * 4_000_001)
    assert find_origin(None, str(a)).bases == ()


def test_a_card_is_a_side_file_like_any_other(tmp_path: Path) -> None:
    """It has the same bytes each time, is verified, and is not replaced once it was edited."""
    a = checkpoint(tmp_path / "a")
    uniform([a, a], output=tmp_path / "soup")
    uniform([a, a], output=tmp_path / "again")
    card = tmp_path / "soup" / "README.md"
    assert card.read_bytes() == (tmp_path / "again" / "README.md").read_bytes()
    assert "README.md" in plan([a, a]).side_files
    replaces = Options(overwrite=True)
    uniform([a, a], output=tmp_path / "soup", options=replaces)
    card.write_text(card.read_text() + "\nMy own words.\n")
    with pytest.raises(VerificationError, match=r"README\.md has changed"):
        verify(tmp_path / "soup", quick=True)
    with pytest.raises(OutputExistsError, match=r"were changed since .*README\.md"):
        uniform([a, a], output=tmp_path / "soup", options=replaces)


def test_without_a_card(tmp_path: Path) -> None:
    """With ``--no-card`` no card is written, and none is inherited."""
    a = checkpoint(tmp_path / "a", card="# Stale\n")
    found = command("uniform", a, a, "-o", tmp_path / "soup", "--no-card")
    assert found.returncode == 0, found.stderr
    assert not (tmp_path / "soup" / "README.md").exists()
    assert "README.md" not in plan([a, a], options=Options(card=False)).side_files


def test_coefficients_of_single_tensors_are_a_range(tmp_path: Path) -> None:
    """Where tensors have coefficients of their own, the table has the smallest and the largest."""
    a = save(tmp_path / "a", WEIGHTS | {"v": tensor(np.ones(3, "f4"))})
    own = {"w": (0.25, 0.75), "v": (0.5, 0.5)}
    mix([a, a], Coefficients((0.5, 0.5), 1.0, own), output=tmp_path / "soup")
    _, body = read(tmp_path / "soup")
    assert [row[2] for row in rows(body)[1:]] == ["0.25 to 0.5", "0.5 to 0.75"]
    assert "2 tensors with coefficients of their own" in body


def test_a_rule_is_given_with_its_parameters(tmp_path: Path) -> None:
    """A merge that is no sum with coefficients lists the parameters of its rule."""
    paths = [checkpoint(tmp_path / name) for name in "abc"]
    ties(paths[:2], 0.5, base=paths[2], output=tmp_path / "soup")
    data, body = read(tmp_path / "soup")
    assert data["tags"][-1] == "ties"
    assert "The rule task" in body.replace("\\", "")
    assert len(rows(body)) == 4
    assert rows(body)[1] == ["1", "c (base)"]
    assert [len(row) for row in rows(body)] == [2] * 4


def test_scores_of_a_search_are_shown(tmp_path: Path) -> None:
    """A greedy soup's card has its score, and that of each ingredient alone."""
    paths = []
    for seed, name in enumerate("ab"):
        weights = {"w": tensor(np.full(3, seed + 1, "f4"))}
        paths.append(save(tmp_path / name, weights))
    score = "python3 -c \"print(sum(open('{checkpoint}/model.safetensors','rb').read()[-4:]))\""
    found = command("greedy", *paths, "--command", score, "-o", tmp_path / "soup")
    assert found.returncode == 0, found.stderr
    _, body = read(tmp_path / "soup")
    table = {row[0]: row[1] for row in rows(body) if len(row) == 2}
    alone = {name: sum((tmp_path / name / "model.safetensors").read_bytes()[-4:]) for name in "ab"}
    assert {name: table[f"{name} alone"] for name in "ab"} == {
        name: f"{value}" for name, value in alone.items()
    }
    assert float(table["this soup"]) >= max(alone.values())


def test_yaml_reads_the_front_matter(tmp_path: Path) -> None:
    """A parser of YAML reads what the tests above read."""
    yaml = pytest.importorskip("yaml")
    front = "---\nlicense: no\nbase_model:\n- org/1.0\n- 1/2\n---\n"
    a = checkpoint(tmp_path / "a", card=front)
    uniform([a, a], output=tmp_path / "soup")
    data, _ = read(tmp_path / "soup")
    text = (tmp_path / "soup" / "README.md").read_text().split("---\n", 2)[1]
    assert yaml.safe_load(text) == data
    assert data["license"] == "no"
    assert data["base_model"] == ["org/1.0", "1/2"]


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    """`huggingface_hub` reads base models, library and tags out of it, and finds it valid."""
    hub = pytest.importorskip("huggingface_hub")
    a = checkpoint(tmp_path / "a", config={"_name_or_path": "org/base", "model_type": "x"})
    uniform([a, a], output=tmp_path / "soup")
    data = hub.ModelCard.load(tmp_path / "soup" / "README.md").data
    assert data.base_model == ["org/base"]
    assert data.library_name == "transformers"
    assert data.tags == ["merge", "streamsoup", "uniform"]
    assert data.to_dict()["base_model_relation"] == "merge"
