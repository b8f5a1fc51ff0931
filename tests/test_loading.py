"""Task files are found, and have what lies beside them; nobody else has it."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import networks
import numpy as np
import pytest

from streamsoup import greedy
from streamsoup.errors import TaskError
from streamsoup.task import load_task
from streamsoup.task.running import contained


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the ingredients' folders."""
    return networks.ingredients(tmp_path_factory.mktemp("ingredients"), 2)


def test_where_tasks_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, modules, objects in modules, classes and functions are tasks; others are refused."""
    text = "class Mine:\n    main = 'b'\n    def score(self, model, split):\n"
    text += "        return {'a': 1, 'b': 2}\n"
    (tmp_path / "my_soup_task.py").write_text(text + "mine = Mine()\n")
    monkeypatch.syspath_prepend(tmp_path)
    for given in ("my_soup_task:mine", "my_soup_task:Mine", f"{tmp_path}/my_soup_task.py:mine"):
        assert load_task(given).score(None, "val").value == 2
    assert load_task(lambda model: 0.5).score(None, "val").value == 0.5
    with pytest.raises(TaskError, match="no such task file"):
        load_task("nowhere.py")
    with pytest.raises(TaskError, match="there is no module 'nowhere_at_all'"):
        load_task("nowhere_at_all:x")
    with pytest.raises(TaskError, match="has no 'other'"):
        load_task("my_soup_task:other")


def test_a_task_may_lie_in_a_folder_with_a_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is a path; a colon after it names an object all the same."""
    monkeypatch.chdir(tmp_path)
    Path("run:3").mkdir()
    Path("run:3/task.py").write_text("class Mine:\n    score = min\ndef score(model): return 3\n")
    assert load_task("run:3/task.py").score(None, "val").value == 3
    assert load_task("run:3/task.py:Mine").has("score")
    with pytest.raises(TaskError, match=r"run:4/task\.py: no such task file"):
        load_task("run:4/task.py")


def test_loading_a_task_leaves_the_world_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the working folder nor numpy's error handling is the task's to choose."""
    monkeypatch.chdir(tmp_path)
    change = "os.chdir('/'); np.seterr(all='raise')"
    head = "import os\nimport numpy as np\n"
    Path("task.py").write_text(f"{head}{change}\ndef score(model): return 1\n")
    Path("later.py").write_text(
        f"{head}class Mine:\n    def __init__(self): {change}\n"
        f"    def splits(self): {change}; return ['a']\n    def score(self, model): return 1\n"
    )
    before = np.geterr()
    for task in ("task.py", "later.py:Mine"):
        load_task(task)
        assert Path.cwd() == tmp_path
        assert np.geterr() == before


def test_each_task_file_has_what_lies_beside_it(tmp_path: Path) -> None:
    """A helper of one name beside two task files is two helpers, in whatever order they load."""
    before = list(sys.path)
    for number, name in enumerate("ab"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "__init__.py").write_text("from inner.deep import V\n")
        (tmp_path / name / "inner" / "deep.py").write_text(f"V = {number}\n")
        (tmp_path / name / "helper.py").write_text("from inner import V\n")
        (tmp_path / name / "task.py").write_text(
            "from helper import V\ndef score(model, split): return V\n"
        )
    loaded = [load_task(str(tmp_path / name / "task.py")) for name in "aba"]
    assert [task.score(None, "val").value for task in loaded] == [0, 1, 0]
    assert sys.path == before
    assert not {"helper", "inner", "inner.deep"} & sys.modules.keys()


def test_what_the_caller_imports_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str]
) -> None:
    """A helper of a task is no module of the program that calls, before, while or after it runs."""
    for name in ("task", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helping.py").write_text(f"WHOSE = {name!r}\n")
    task, _ = networks.task_file(tmp_path / "task")
    late = "\ndef score(model, split):\n    from helping import WHOSE\n    return len(WHOSE)\n"
    task.write_text(f"import helping\n{task.read_text()}{late}")
    greedy(paths, task, output=tmp_path / "a")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    import helping  # type: ignore[import-not-found]

    assert helping.WHOSE == "mine"
    soup = greedy(paths, task, output=tmp_path / "b")
    assert soup.score == len("task")
    assert sys.modules["helping"] is helping
    del sys.modules["helping"]


def test_task_files_in_threads_import_what_lies_beside_them(tmp_path: Path) -> None:
    """Also as they score, when another's folder was looked in last."""
    ingredients = networks.ingredients(tmp_path / "in", 2)
    wrong: list[object] = []

    def search(number: int) -> None:
        folder = tmp_path / f"task{number}"
        folder.mkdir()
        (folder / "metric_of_it.py").write_text(f"V = {number}\n")
        task, _ = networks.task_file(folder)
        late = "\ndef score(model, split):\n    from metric_of_it import V\n    return V\n"
        task.write_text(task.read_text() + late)
        try:
            for n in range(5):
                soup = greedy(ingredients, task, output=folder / f"out{n}")
                wrong.extend([] if soup.score == number else [(number, soup.score)])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_every_way_to_import_what_lies_beside(tmp_path: Path) -> None:
    """Packages, relative and star imports, cycles, and names at run time: as in a script."""
    files = {
        "plain.py": "from __future__ import annotations\nA = 1\n",
        "stars.py": "__all__ = ['B']\nB = 2\nHIDDEN = 0\n",
        "kit/__init__.py": "from .near import C\nfrom . import near\n",
        "kit/near.py": "from . import far\nC = 3\n",
        "kit/far.py": "import kit\nfrom kit import near\nD = 4\n",
        "bare/deep/leaf.py": "E = 5\n",
        "data/readme.txt": "",
        "json/readme.txt": "",
        "records.py": "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass R:\n    x: int = 6\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    task = tmp_path / "task.py"
    task.write_text(
        "import plain as p\nfrom stars import *\nimport kit.far\nfrom bare.deep import leaf\n"
        "import json, pickle, importlib\nfrom records import R\nfrom . import plain\n"
        "assert p is plain and 'HIDDEN' not in dir()\n"
        "assert importlib.import_module('kit.near').C == kit.C == 3\n"
        "assert importlib.import_module('.far', 'kit').D == 4\n"
        "assert importlib.import_module('math').pi > 3\n"
        "assert pickle.loads(pickle.dumps(R(7))) == R(7)\n"
        "import sys, importlib.util\nassert importlib.util.find_spec('sys')\n"
        "try:\n    import kit.absent\nexcept ModuleNotFoundError as error:\n"
        "    assert error.name == 'kit.absent'\n"
        "try:\n    from plain import absent\nexcept ImportError: pass\n"
        "def score(model):\n    from bare.deep.leaf import E\n    return json.loads('[1]')[0] + E\n"
    )
    before = set(sys.modules)
    assert load_task(task).score(None, "val").value == 6
    named = {"plain", "stars", "kit", "bare", "records", "task"}
    assert not named & {name.partition(".")[0] for name in set(sys.modules) - before}


def test_a_loading_keeps_its_modules_when_the_file_is_loaded_again(tmp_path: Path) -> None:
    """An import that runs late gets what its own loading has, and threads get one and the same."""
    (tmp_path / "late.py").write_text("import time\ntime.sleep(0.05)\nclass Own: pass\n")
    (tmp_path / "task.py").write_text(
        "import threading\ndef score(model):\n    found = []\n"
        "    def get():\n        from late import Own\n        found.append(Own)\n"
        "    threads = [threading.Thread(target=get) for _ in range(4)]\n"
        "    for thread in threads: thread.start()\n    for thread in threads: thread.join()\n"
        "    assert len(found) == 4\n    seen.update(found)\n    return len(set(found))\n"
        "seen = set()\n"
    )
    first = load_task(tmp_path / "task.py")
    assert first.score(None, "val").value == 1
    again = load_task(tmp_path / "task.py")
    assert again.score(None, "val").value == 1
    assert first.score(None, "val").value == 1
    assert len(first.source.seen) == len(again.source.seen) == 1
    assert first.source.seen != again.source.seen
    assert not [name for name in sys.modules if name == "late"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_fork_while_a_task_is_loading(tmp_path: Path) -> None:
    """The child may load a task: it does not wait for a thread that it does not have."""
    loading, forked = tmp_path / "loading", tmp_path / "forked"
    (tmp_path / "helper.py").write_text(
        f"import os, time\nopen({str(loading)!r}, 'w').close()\n"
        f"while not os.path.exists({str(forked)!r}): time.sleep(0.01)\n"
    )
    (tmp_path / "slow.py").write_text("import helper\ndef score(model): return 1\n")
    (tmp_path / "task.py").write_text("def score(model): return 1\n")
    thread = threading.Thread(target=load_task, args=(tmp_path / "slow.py",))
    thread.start()
    deadline = time.monotonic() + 20
    while not loading.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if load_task(tmp_path / "task.py").fingerprint else 1)
        finally:
            os._exit(2)
    ended = (0, 0)
    while ended[0] == 0 and time.monotonic() < deadline:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    forked.touch()
    thread.join()
    assert ended == (child, 0)


@pytest.mark.parametrize("where", ["loading", "scoring"])
def test_the_last_line_of_the_users_own_is_named(tmp_path: Path, where: str) -> None:
    """Neither the first line on the way to a failure, nor one in a library that it called."""
    (tmp_path / "helper.py").write_text(
        "import json\ndef parse(text):\n    return json.loads(text)\n"
    )
    call = "parse('{')" if where == "loading" else "0"
    (tmp_path / "task.py").write_text(
        f"from helper import parse\nV = {call}\ndef score(model):\n    return parse('{{')\n"
    )

    def use() -> None:
        task = load_task(tmp_path / "task.py")
        with contained(task, "score"):
            task.score(None, "val")

    with pytest.raises(
        TaskError, match=r"JSONDecodeError: .* \(line 3 of .*helper\.py, in parse\)"
    ) as failed:
        use()
    cause = failed.value.__cause__
    assert cause is not None
    frames = [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert "raw_decode" in frames, "--traceback has all of them"


def test_a_task_that_is_gone_leaves_nothing(tmp_path: Path) -> None:
    """Its modules are forgotten with it; functions of theirs that somebody holds still run."""
    (tmp_path / "helper.py").write_text("V = 5\n")
    (tmp_path / "task.py").write_text("import helper\ndef score(model): return helper.V\n")
    gc.collect()
    before, finders = set(sys.modules), list(sys.meta_path)
    task = load_task(tmp_path / "task.py")
    score = task.source.score
    assert len(set(sys.modules) - before) == 3
    del task
    gc.collect()
    assert set(sys.modules) <= before
    assert sys.meta_path == finders
    assert score(None) == 5
    (tmp_path / "broken.py").write_text("import helper\nraise ValueError\n")
    with pytest.raises(TaskError, match="ValueError"):
        load_task(tmp_path / "broken.py")
    assert set(sys.modules) <= before
