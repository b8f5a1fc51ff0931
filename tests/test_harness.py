"""Tasks of lm-evaluation-harness: with the real package where it is installed, else with a double.

The double has the interface that was seen in lm-eval 0.4.13, and no more.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import networks
import pytest
import torch

from streamsoup import GreedySettings, greedy
from streamsoup.errors import TaskError
from streamsoup.task import load_task
from streamsoup.task.harness import FEWSHOT_SEED, HarnessTask, pick

REAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put a double in the place of the harness; give what it was asked."""
    asked = SimpleNamespace(
        defaults=[], paths=[], names=[], seeds=[], limits=[], devices=[], batches=[]
    )

    class TaskManager:
        def __init__(self, include_path: list[str], include_defaults: bool) -> None:
            asked.defaults.append(include_defaults)
            asked.paths.append(include_path)
            self.task_index = {
                name: SimpleNamespace(yaml_path=folder / f"{name}.yaml")
                for folder in map(Path, include_path)
                for name in ("sized", "one")
            }

        def load(self, names: list[str]) -> dict[str, Any]:
            asked.names.append(names)
            if "broken.yaml" in names[0]:
                raise TypeError("expected str, bytes or os.PathLike object, not NoneType")
            if "unknown" in names:
                raise KeyError("Spec 'unknown' is not a registered task/group/tag name")
            tasks = {
                name: SimpleNamespace(set_fewshot_seed=asked.seeds.append)
                for name in ("mine", "one", "two", "three")
            }
            return {
                "tasks": tasks,
                "groups": {"sized": None, "plain": None},
                "group_map": {"sized": ["one"], "plain": ["two", "three"]},
            }

    class HFLM:
        def __init__(self, pretrained: str, device: str, batch_size: str) -> None:
            asked.devices.append(device)
            asked.batches.append(batch_size)
            self.model = networks.build()

    def evaluate(lm: HFLM, loaded: Any, limit: int, bootstrap_iters: int, log_samples: bool) -> Any:
        assert bootstrap_iters == 0
        assert not log_samples
        asked.limits.append(limit)
        score = networks.score(lm.model)
        results: dict[str, Any] = {
            name: {"alias": name, "sample_len": 9, "acc,none": score, "acc_stderr,none": "N/A"}
            for name in ("mine", "one", "two", "three", "sized")
        }
        results["sized"]["acc,none"] = score / 2
        results["three"]["acc,none"] = score / 2
        results["plain"] = {"alias": "plain", "name": "plain"}
        return {"results": results, "higher_is_better": {name: {"acc": True} for name in results}}

    parts: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.evaluator": {"evaluate": evaluate},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_tasks_and_groups_count_once_each(tmp_path: Path, double: SimpleNamespace) -> None:
    """The score is the mean over tasks and groups; tasks in a group count as their group does."""
    paths = networks.ingredients(tmp_path / "in", 3)
    task = HarnessTask(("mine", "sized", "plain"), 7, None, "4", paths[0])
    soup = greedy(paths, task, output=tmp_path / "out")
    for single in soup.singles:
        acc = networks.mean_score(paths, single.members)
        metrics = single.score.metrics
        assert metrics["mine acc"] == acc
        assert metrics["sized acc"] == acc / 2
        assert metrics["plain mean"] == (acc + acc / 2) / 2
        assert single.score.value == pytest.approx((acc + acc / 2 + acc * 3 / 4) / 3)
        assert len(metrics) == 4
    assert double.defaults == [True], "the index is made once"
    assert set(double.limits) == {7}
    assert set(double.seeds) == {FEWSHOT_SEED}
    assert len(double.seeds) == 4 * len(double.limits), "before each score, for each task"


def test_a_task_file_needs_no_index(tmp_path: Path, double: SimpleNamespace) -> None:
    """Files of the user's own are loaded without the built-in tasks; their text is watched."""
    file = tmp_path / "mine.yaml"
    file.write_text("task: mine\ninclude: base\n")
    (tmp_path / "base.yaml").write_text("metric: acc\n")
    paths = networks.ingredients(tmp_path / "in", 2)
    task = HarnessTask((str(file),), None, None, "4", paths[0])
    before = load_task(task).fingerprint
    assert load_task(task).fingerprint == before
    task.build()
    assert double.defaults == [False]
    (tmp_path / "base.yaml").write_text("metric: f1\n")
    assert load_task(task).fingerprint != before


def test_a_group_file_is_loaded_by_its_name(tmp_path: Path, double: SimpleNamespace) -> None:
    """The harness takes no group by its path; its folder is searched for what it names."""
    folder = tmp_path / "tasks"
    (folder / "below").mkdir(parents=True)
    file = folder / "sized.yaml"
    file.write_text("group: sized\ntask:\n  - one\n")
    (folder / "below" / "one.yaml").write_text("task: one\n")
    task = HarnessTask(("mine", str(file)), None, None, "auto", str(tmp_path))
    before = load_task(task).fingerprint
    task.build()
    assert double.names == [["mine", "sized"]]
    assert double.paths == [[str(folder)]]
    assert double.defaults == [True], "it may name built-in tasks"
    assert double.batches == ["auto"]
    (folder / "below" / "one.yaml").write_text("task: one\nnum_fewshot: 1\n")
    assert load_task(task).fingerprint != before
    broken = tmp_path / "broken.yaml"
    broken.write_text("group: broken\ntask: [nowhere]\n")
    with pytest.raises(TaskError, match=r"broken\.yaml: cannot be loaded: TypeError.* by name amo"):
        HarnessTask((str(broken),), None, None, "1", str(tmp_path)).build()


def test_an_unknown_task_is_named(tmp_path: Path, double: SimpleNamespace) -> None:
    """A name that the harness does not know is said, with where to look."""
    with pytest.raises(TaskError, match=r"'unknown' is not a registered task.*lm-eval ls tasks"):
        HarnessTask(("unknown",), None, None, "4", str(tmp_path)).build()


@pytest.mark.parametrize(
    ("results", "metric", "expected"),
    [
        ({"acc,none": 0.5, "acc_norm,none": 0.75}, None, ("acc_norm", 0.75)),
        ({"exact_match,strict": 0.5, "exact_match,lax": 1}, None, ("exact_match,strict", 0.5)),
        ({"exact_match,strict": 0.5, "exact_match,lax": 1}, "exact_match,lax", None),
        ({"acc,none": 0.5, "acc_stderr,none": 9.0}, "acc", ("acc", 0.5)),
    ],
)
def test_which_metric_counts(
    results: dict[str, Any], metric: str | None, expected: tuple[str, float] | None
) -> None:
    """The usual metric counts, of the first filter; both can be named."""
    assert pick("t", results, None, metric) == (expected or ("exact_match,lax", 1.0))


def test_a_metric_that_is_not_there() -> None:
    """What there is instead is listed; lengths and errors are no metrics."""
    results = {"sample_len": 40, "bits_per_byte,none": 0.7, "acc_stderr,none": 0.1}
    with pytest.raises(TaskError, match=r"but bits_per_byte,none; choose one with metric"):
        pick("t", results, None, None)


@pytest.mark.skipif(REAL, reason="lm-eval is installed")
def test_lm_eval_asks_for_what_it_needs() -> None:
    """Without the extra dependency, the message says how to get it."""
    with pytest.raises(TaskError, match=r"no module lm_eval\): pip install 'streamsoup\[lm-eval\]"):
        HarnessTask(("hellaswag",), 10, None, "4", "nowhere").build()


@pytest.mark.skipif(not REAL, reason="needs the extra lm-eval")
@pytest.mark.filterwarnings("default")
def test_the_real_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a task file and models of our own, each score is that of a model loaded for it alone."""
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = write_task(tmp_path)
    paths = [save_model(tmp_path / f"run{i}", i) for i in range(3)]
    search = GreedySettings(order="given", isolate=True)
    task = HarnessTask((str(file),), 20, None, "4", paths[0])
    soup = greedy(paths, task, output=tmp_path / "out", settings=search)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    group = tmp_path / "group.yaml"
    group.write_text(
        "group: ours\ntask: [mine]\naggregate_metric_list:\n"
        "  - metric: acc\n    weight_by_size: true\n"
    )
    grouped = HarnessTask((str(group),), 20, None, "8", paths[0])
    found = greedy(paths, grouped, output=tmp_path / "grouped", settings=search)
    assert found.score == pytest.approx(soup.score)
    assert found.members == soup.members
    states = [transformers.AutoModelForCausalLM.from_pretrained(p).state_dict() for p in paths]
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths[0])
    for trial in soup.runs[0].trials:
        model = transformers.AutoModelForCausalLM.from_pretrained(paths[0])
        chosen = [states[i] for i in trial.members]
        model.load_state_dict(
            {n: torch.stack([s[n].double() for s in chosen]).mean(0).float() for n in states[0]}
        )
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=["mine"],
            task_manager=manager,
            limit=20,
            bootstrap_iters=0,
        )
        assert trial.score.value == found["results"]["mine"]["acc,none"]
    assert len({trial.score.value for trial in soup.runs[0].trials}) > 1
    assert soup.report["task"] == "lm-eval"


def write_task(folder: Path) -> Path:
    """Write a task file, few-shot, with data of its own."""
    words = ["red", "green", "blue"]
    rows = [
        {"q": f"{words[i % 3]} is not {words[i // 3 % 3]}", "choices": words, "label": i % 3}
        for i in range(30)
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = folder / "mine.yaml"
    file.write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder}/mine.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
        "num_fewshot: 2\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n    aggregation: mean\n"
        "    higher_is_better: true\nmetadata:\n  version: 1.0\n"
    )
    return file


def save_model(folder: Path, number: int) -> str:
    """Save a tiny language model near a common one, with its tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "<eos>", "red", "green", "blue", "is", "not"]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=2, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config)
    torch.manual_seed(number)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
