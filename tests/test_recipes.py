"""Recipes of our own format: one list of keys, the same bytes as the command, refusals by line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import pipelines
import pytest
from checkpoints import load, save, tensor

import streamsoup
from streamsoup.cli import cli, main
from streamsoup.cli.recipes import (
    arguments_of,
    is_recipe_command,
    keys_of,
    recipe_text,
    schema,
)
from streamsoup.errors import RecipeError
from streamsoup.formats import documents
from streamsoup.formats.documents import read_document

COMMANDS: Mapping[str, click.Command] = dict(main.commands)
MAKING = [name for name, command in COMMANDS.items() if is_recipe_command(command)]

LINES = {
    "uniform": "A B C --dtype f64 --shard-size 5MB",
    "mix": "A B -c .5,1e-3 -c '*wei*=.3,0~1~.5' --normalize",
    "interpolate": "A B --alpha -.25",
    "ema": "A B C --by given --decay .8",
    "lawa": "A B C --window 2 --by given",
    "wsm": "A B C --curve sqrt --by given",
    "arithmetic": "B C --base A --scale .4~.2,-1",
    "stock": "B C --base A",
    "slerp": "B C -t .3",
    "ties": "B C --base A --density .5 -c .3,.7 --trim model --threads 2",
    "dare": "B C --base A --density .5,.25 --no-rescale --seed 7 --consensus sum",
    "breadcrumbs": "B C --base A --density .5 --density '*ght=.4,.3~.6' --gamma .02,.01",
    "della": "B C --base A --density .5 --no-normalize --lambda 1e-1",
    "sce": "B C --base A --select-topk .1",
    "ram": "B C --base A --epsilon 1e-5",
    "nearswap": "B --base A -t 1e-3",
    "karcher": "A B C -w 1,1,2",
    "multislerp": "B C --base A",
    "nuslerp": "A B -t .25",
    "greedy": "A B C --command 'python score.py {checkpoint}' --timeout 9.5 --backward --z 1",
    "learned": "A B --task task.py --per layer --lr .1 --temperature",
}


def words_of(name: str) -> list[str]:
    """Return a command line of a command."""
    import shlex

    return [name, *shlex.split(LINES[name])]


@pytest.fixture(autouse=True)
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save three checkpoints A, B and C in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    base = rng.normal(size=(20, 30))
    for name in "ABC":
        values = base + 0.01 * rng.normal(size=base.shape)
        save(tmp_path / name, {"weight": tensor(values.astype("f4"))})
    return tmp_path


def written(text: str) -> str:
    """Write a recipe, and return its path."""
    Path("r.yaml").write_text(text)
    return "r.yaml"


def parsed(words: list[str]) -> dict[str, Any]:
    """Return what a command line says."""
    context = COMMANDS[words[0]].make_context(words[0], words[1:])
    return dict(context.params)


def provenance(folder: str) -> dict[str, Any]:
    """Return a provenance without the time it was made at."""
    found: dict[str, Any] = json.loads(Path(folder, "streamsoup.json").read_text())
    del found["created"], found["checksum"]
    return found


def test_every_command_that_writes_a_soup_is_here() -> None:
    """Whatever can be made is in the tests below, so that a new command is tested too."""
    making = {"uniform", "mix", "interpolate", *LINES}
    assert set(MAKING) >= making
    assert set(LINES) >= {name for name in MAKING if name not in ("sweep", "watch")}


@pytest.mark.parametrize("name", MAKING)
def test_keys_are_the_options_of_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each option that the help lists is a key of that name, and each key is in the help."""
    assert cli([name, "--help"]) == 0
    shown = capsys.readouterr().out
    listed = re.findall(r"^  (?:-\w, )?(--?[\w-]+)", shown, re.MULTILINE)
    options = {each.lstrip("-").replace("-", "_") for each in listed}
    about = {"print_recipe", "json", "quiet", "traceback", "help"}
    keys = keys_of(COMMANDS[name])
    negations = {each for each in options if each.startswith("no_") and each[3:] in options}
    assert options - about - negations == {n for n, key in keys.items() if not key.is_argument}


@pytest.mark.parametrize("name", LINES)
def test_a_printed_recipe_says_the_same(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What --print-recipe prints, read back, is the command line; and the schema takes it."""
    words = words_of(name)
    assert cli([*words, "--print-recipe", "-o", "soup"]) == 0
    text = capsys.readouterr().out
    table = read_document(written(text))
    back = parsed([name, *arguments_of(COMMANDS[name], table)])
    there = parsed([*words, "-o", "soup"])
    if there.get("no_rescale"):
        there |= {"no_rescale": False, "rescale": "none"}
    assert back == there
    import yaml

    assert fits(yaml.safe_load(text), schema(COMMANDS))


@pytest.mark.parametrize("name", [n for n in LINES if n not in ("greedy", "learned")])
def test_a_recipe_makes_the_bytes_of_its_command(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes and provenance, whether by command line or by the recipe it prints."""
    words = words_of(name)
    assert cli([*words, "-q", "-o", "direct"]) == 0
    capsys.readouterr()
    assert cli([*words, "--print-recipe"]) == 0
    path = written(capsys.readouterr().out)
    assert cli(["run", path, "-q", "-o", "run"]) == 0
    for file in Path("direct").iterdir():
        if file.name != "streamsoup.json":
            assert file.read_bytes() == Path("run", file.name).read_bytes()
    assert provenance("run") == provenance("direct")
    streamsoup.verify("run")


def test_a_search_runs_from_a_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    """Greedy with a command that scores is a recipe as any other; options given count more."""
    Path("score.py").write_text("import sys; print(-len(sys.argv[1]))\n")
    path = written(
        "method: greedy\ningredients: [A, B]\n"
        f"command: {sys.executable} score.py {{checkpoint}}\noutput: no\n"
    )
    assert cli(["run", path, "--json", "-o", "soup", "--threads", "1"]) == 0
    assert json.loads(capfd.readouterr().out)["recipe"]["method"] == "greedy"
    assert Path("soup/streamsoup.json").exists()
    assert not Path("no").exists()


@pytest.mark.parametrize("name", ["slerp", "dare", "greedy"])
def test_a_soup_is_a_recipe_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run SOUP -o AGAIN` makes the same bytes and provenance, however the soup was found."""
    Path("score.py").write_text("import sys; print(-len(sys.argv[1]))\n")
    words = words_of(name)
    if name == "greedy":
        words = ["greedy", "A", "B", "C", "--command", f"{sys.executable} score.py {{checkpoint}}"]
    assert cli([*words, "-q", "-o", "one", "--dtype", "bf16"]) == 0
    assert cli(["run", "one", "-q", "-o", "two"]) == 0
    assert cli(["run", "one/streamsoup.json", "-q", "-o", "three", "--threads", "1"]) == 0
    for other in ("two", "three"):
        assert provenance(other) == provenance("one")
        weights = [Path(each, "model.safetensors").read_bytes() for each in ("one", other)]
        assert weights[0] == weights[1]
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert cli(["run", "../one", "-q", "-o", "four"]) == 0
    assert Path("four/model.safetensors").read_bytes() == weights[0]
    assert "(base)" in Path("four/README.md").read_text() or name != "dare"
    monkeypatch.chdir("..")
    capsys.readouterr()
    assert cli(["run", "one"]) == 2
    assert "needs another folder: give -o OUT" in capsys.readouterr().err
    assert cli(["run", "one", "-o", "four", "--dtype", "f32"]) == 2
    assert "--dtype=f32: a soup is made again as it was" in capsys.readouterr().err
    assert cli(["run", "one", "-o", "four", "--key", "ema"]) == 2
    assert "--key=ema: a soup is made again as it was" in capsys.readouterr().err
    assert cli(["run", "one", "-o", "four", "--drop"]) == 2
    assert "--drop: a soup is made again as it was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: tie\n", r"r\.yaml:1: method: 'tie' is no method; did you mean ties\?"),
        ("metod: ties\n", r"r\.yaml:1: names no method; add one"),
        ("method: sort\n", "'sort' is no method; it has "),
        (
            "method: ties\nbase: A\n\ndensty: .4\n",
            r"r\.yaml:4: densty: ties has no such key; did you mean density\?",
        ),
        ("method: sce\nselect-topk: 1\n", r"r\.yaml:2: select-topk: .*mean select_topk\?"),
        ("method: ties\nbase: A\ndensity: .5\n", r"r\.yaml:1: ties needs ingredients"),
        ("method: uniform\ningredients: A\n", r":2: ingredients: expected a list, got 'A'"),
        ("method: uniform\ningredients: []\n", r":2: ingredients: expected a list, got a list"),
        ("method: uniform\ningredients: [[A]]\n", r":2: expected one value, got a list"),
        ("method: ties\ndensity: [.5, a]\n", r":2: 'a' is not a valid number"),
        ("method: ties\ndensity:\n  - .5\n  - 1.5\n", r":4: 1\.5 is not in the range 0<=x<=1"),
        ("method: ties\ndensity: 1_0\n", r":2: density: '1_0' is not a list of numbers"),
        ("method: dare\nseed: '1'\n", r":2: seed: '1' is text, not a number; leave out the quotes"),
        ("method: dare\nseed: 1.5\n", r":2: seed: '1\.5' is not a valid integer"),
        ("method: dare\nnormalize: yes\n", r":2: normalize: expected true or false, got 'yes'"),
        ("method: dare\nconsensus: sun\n", r":2: consensus: 'sun' is not one of 'sum', 'none'"),
        ("method: dare\nlambda: {a: 1}\n", r":2: lambda: expected one value, got a table"),
        (
            "method: mix\ningredients: [A]\ncoefficients: nosoup\noutput: o\n",
            r":3: coefficients: 'nosoup' is not a list of numbers .* and no such file",
        ),
        ("method: mix\ningredients: [A]\noutput: o\n", r"r\.yaml: mix needs --coefficients"),
        ("method: uniform\ningredients: [A]\n", r":1: names no output; add one, or give -o OUT"),
        ("- a\n", r"r\.yaml:1: expected keys with values"),
        ("", r"r\.yaml:1: expected keys with values"),
        ("a: 1\na: 2\n", r"r\.yaml:2: cannot be read as YAML: a stands here and in line 1"),
        ("a: [1\n", r"r\.yaml:2: cannot be read as YAML: expected ',' or ']'"),
        (
            "a: !!python/object:os.system x\n",
            r":1: cannot be read as YAML: the tag .*python.object",
        ),
        ("a: *b\n", r":1: cannot be read as YAML: \*b names nothing before it"),
        ("a: &b [*b]\n", r"\*b names nothing before it"),
        ("a: 1\n---\nb: 1\n", r":2: cannot be read as YAML: a recipe is one document"),
        ("? [a]\n: 1\n", r":1: cannot be read as YAML: a key is a word"),
        ("<<: {a: 1}\n", r":1: cannot be read as YAML: keys are not merged"),
        ("a: " + "[" * 30, r":1: cannot be read as YAML: more than 20 lists"),
        ('a: "\\UFFFFFFFF"\n', r":1: cannot be read as YAML: it has a character"),
        ("a: 1\x00\n", r":1: cannot be read as YAML: "),
    ],
)
def test_refusals_name_line_and_key(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a recipe may not say is refused in one line: file, line, key, and what is near it."""
    assert cli(["run", written(text)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_what_aliases_unfold_to_is_bounded() -> None:
    """Ten lines that stand for a billion values are refused before they are unfolded."""
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(RecipeError, match=r"r\.yaml:5: .* more than 50000 values"):
        read_document(written("\n".join(lines)))


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder, one that is too large, and one that is not UTF-8."""
    for name, content in (("large", b"#" * (documents.LARGEST + 1)), ("latin", b"a: \xff\n")):
        Path(name).write_bytes(content)
    for name in ("missing", str(tmp_path), "large"):
        with pytest.raises(RecipeError, match="cannot be read: "):
            read_document(name)
    with pytest.raises(RecipeError, match=r"latin:1: cannot be read as YAML"):
        read_document("latin")


def test_scalars_are_read_as_what_their_key_wants(capsys: pytest.CaptureFixture[str]) -> None:
    """1e-5 is a number and `on` a folder, whatever YAML 1.1 takes them for; JSON is read too."""
    Path("A").rename("on")
    text = '{"method": "ram", "ingredients": [on, "B"], "base": "C", "epsilon": 1e-5}'
    table = read_document(written(text))
    found = parsed(["ram", "-o", "x", *arguments_of(COMMANDS["ram"], table)])
    assert (found["ingredients"], found["epsilon"]) == (("on", "B"), 1e-5)


def test_the_schema_is_printed_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    """Run --schema prints what `schema` returns; it refuses unknown keys, words and types."""
    assert cli(["run", "--schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(schema(COMMANDS)))
    good = {"method": "ties", "ingredients": ["A"], "base": "B", "density": 0.5}
    assert fits(good, printed)
    for wrong in (
        {"densty": 1},
        {"density": True},
        {"trim": "layer"},
        {"ingredients": "A"},
        {"method": "tie"},
        {"base": ["B"]},
        {"threads": 0},
    ):
        assert not fits(good | wrong, printed), wrong
    assert not fits({"method": "ties", "ingredients": ["A"], "base": "B"}, printed)


def test_recipes_with_odd_names_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Paths with spaces, quotes, colons, dashes, other scripts, and bytes that are not Unicode."""
    names = ["a b", "x: y", "'q\"", "-dash", "#no", "été", "null", "1", "bad\udcff", "@at", "*x"]
    with COMMANDS["uniform"].make_context("uniform", ["-o", "soup", "--", *names]) as context:
        text = recipe_text(context)
    Path("r.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    back = parsed(["uniform", *arguments_of(COMMANDS["uniform"], read_document("r.yaml"))])
    assert back["ingredients"] == tuple(names)


def fits(value: Any, rules: Mapping[str, Any]) -> bool:
    """Return True if a value is what a JSON schema says, of the words that are used here."""
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "number": (int, float),
        "integer": int,
    }
    known = {*("$schema", "title", "description", "type", "required", "properties", "oneOf")}
    known |= {*("anyOf", "enum", "const", "items", "minItems", "minimum", "maximum")}
    assert set(rules) <= known | {"additionalProperties"}
    if "type" in rules:
        wanted = rules["type"] if isinstance(rules["type"], list) else [rules["type"]]
        fitting = [w for w in wanted if isinstance(value, kinds[w])]
        if (isinstance(value, bool) and "boolean" not in wanted) or not fitting:
            return False
    if isinstance(value, dict):
        properties = rules.get("properties", {})
        if not set(rules.get("required", ())) <= set(value):
            return False
        others = rules.get("additionalProperties", {})
        if others is False and not set(value) <= set(properties):
            return False
        if others and not all(fits(v, others) for k, v in value.items() if k not in properties):
            return False
        if not all(fits(v, properties[k]) for k, v in value.items() if k in properties):
            return False
    if (
        isinstance(value, list)
        and "items" in rules
        and not (
            len(value) >= rules.get("minItems", 0) and all(fits(v, rules["items"]) for v in value)
        )
    ):
        return False
    return (
        ("const" not in rules or value == rules["const"])
        and ("enum" not in rules or value in rules["enum"])
        and ("anyOf" not in rules or any(fits(value, each) for each in rules["anyOf"]))
        and ("oneOf" not in rules or sum(fits(value, each) for each in rules["oneOf"]) == 1)
        and not ("minimum" in rules and value < rules["minimum"])
        and not ("maximum" in rules and value > rules["maximum"])
    )


def test_options_of_run_that_are_lists_replace_those_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given several times, or with commas, counts instead of what the file says."""
    monkeypatch.chdir(tmp_path)
    model = {f"{part}.w": tensor(np.ones(3, np.float32)) for part in "abc"}
    for name in ("one", "two"):
        save(Path(name), model)
    recipe = {"method": "uniform", "ingredients": ["one", "two"], "include": ["a.*"], "drop": True}
    Path("r.json").write_text(json.dumps(recipe))
    assert cli(["run", "r.json", "--include", "b.*", "--include", "c.*", "-o", "out"]) == 0
    assert sorted(load(Path("out/model.safetensors"))) == ["b.w", "c.w"]
    for name in ("pipe1", "pipe2"):
        pipelines.diffusers(Path(name), 1)
    Path("p.json").write_text(json.dumps({"method": "uniform", "ingredients": ["pipe1", "pipe2"]}))
    assert cli(["run", "p.json", "--components", "unet,vae", "-o", "both"]) == 0
    made = json.loads(Path("both/streamsoup.json").read_text())
    assert made["recipe"]["reading"] == {"components": ["unet", "vae"]}
