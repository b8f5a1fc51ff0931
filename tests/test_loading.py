"""Task files are found, and have what lies beside them; nobody else has it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import networks
import numpy as np
import pytest

from streamsoup import greedy_soup
from streamsoup.errors import TaskError
from streamsoup.task import load_task


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Give the ingredients' folders."""
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
    greedy_soup(paths, task, output=tmp_path / "a")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    import helping  # type: ignore[import-not-found]

    assert helping.WHOSE == "mine"
    soup = greedy_soup(paths, task, output=tmp_path / "b")
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
                soup = greedy_soup(ingredients, task, output=folder / f"out{n}")
                wrong.extend([] if soup.score == number else [(number, soup.score)])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
