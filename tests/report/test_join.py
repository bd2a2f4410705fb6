"""`retrofit compare`: what is joined, and what is refused."""

import copy
import json

import pytest
from results import synthetic_result
from typer.testing import CliRunner

from retrofit import cli
from retrofit.report.join import join
from retrofit.report.result import typed_model
from retrofit.report.verdict import verdict
from retrofit.utils.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name, result):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(result if isinstance(result, str) else json.dumps(result))
        return path

    return write


def names(result):
    return [model["name"] for model in result["models"]]


def test_one_base_that_files_share_is_there_once(write):
    first, second = synthetic_result("a"), synthetic_result("b")
    del first["models"][0]["heads"]
    result = join([write("A.json", first), write("B.json", second)])
    assert names(result) == ["base", "a", "b"]
    assert result["models"][2] == second["models"][1]
    assert result["models"][0]["heads"] == second["models"][0]["heads"], "a part of either file"
    assert result["settings"]["sources"] == ["base", "a", "b"]


def test_a_base_is_the_same_up_to_rounding(write):
    first, second = synthetic_result("a"), synthetic_result("b")
    second["models"][0]["metrics"]["perplexity"] *= 1 + 1e-7
    assert names(join([write("A.json", first), write("B.json", second)])) == ["base", "a", "b"]


def test_files_of_an_older_version_lack_what_is_new_and_no_more(write):
    first, second = synthetic_result("a"), synthetic_result("b")
    for model in second["models"]:
        del model["copied_nats_by_window"], model["metrics"]["copied_nats"]
        for metric in ("down_proj_max_activation", "down_proj_kurtosis"):
            del model["metrics"][metric], model["per_layer"][metric]
    paths = [write("A.json", first), write("B.json", second)]
    for order in (paths, paths[::-1]):
        result = join(order)
        base, *others = result["models"]
        assert base == first["models"][0], "the base has what either file has"
        told = {
            model["name"]: {each.subject for each in verdict(*map(typed_model, (base, model)))}
            for model in others
        }
        assert "copied text" in told["a"] and "copied text" not in told["b"]
        assert told["a"] - told["b"] == {"copied text", "inputs of down_proj"}


def test_another_base_under_the_same_name_is_told_apart(write):
    first, second = synthetic_result("a"), synthetic_result("b")
    second["models"][0]["metrics"]["perplexity"] *= 1.01
    result = join([write("A.json", first), write("B.json", second)])
    assert names(result) == ["A/base", "a", "B/base", "b"]
    other, model = result["models"][2:]
    assert other["metrics"]["kl_to_base"] is None and model["metrics"]["kl_to_base"] is None
    assert "prefill_ratio" not in model["cost"] and "weight_bytes" in model["cost"]
    assert set(model["tasks"]["hellaswag"]) == {"accuracy"}
    assert result["models"][1] == first["models"][1], "what is the first base's stays"


def test_models_of_one_name_have_the_file_in_front(write):
    first, second = synthetic_result("gates"), synthetic_result("gates")
    second["models"][1]["metrics"]["peak_column_share"] *= 1.5
    paths = [write("A.json", first), write("B.json", second)]
    assert names(join(paths)) == ["base", "A/gates", "B/gates"]


def test_parts_of_one_model_may_come_from_several_files(write):
    first, second = synthetic_result("gates"), synthetic_result("gates")
    for model in first["models"]:
        del model["long_context"]
    for model in second["models"]:
        del model["streaming"], model["heads"]
    result = join([write("A.json", first), write("B.json", second)])
    assert result["models"] == synthetic_result("gates")["models"]


@pytest.fixture
def answers():
    """As `scripts/tasks.py --out` writes it."""
    accuracy = {"value": 0.5, "stderr": 0.02}
    difference = {"value": -0.1, "stderr": 0.01}
    return {
        "models": [
            {"name": "base", "tasks": {"lambada": {"accuracy": accuracy}}, "average": {}},
            {
                "name": "gates",
                "tasks": {
                    "lambada": {
                        "accuracy": accuracy,
                        "accuracy_difference": difference,
                        "nats_difference": {"value": 0.2, "stderr": 0.05},
                    }
                },
                "average": {},
            },
        ],
        "settings": {"documents": {"lambada": 500}, "seed": 0, "dtype": "float32"},
    }


def without_tasks(result):
    for part in (*result["models"], result["settings"]):
        del part["tasks"]
    return result


def test_tasks_are_added_to_the_models_that_they_are_of(write, answers):
    measured = without_tasks(synthetic_result("gates"))
    paths = [write("A.json", measured), write("tasks.json", answers)]
    result = join(paths)
    assert names(result) == ["base", "gates"]
    assert result["models"][1]["tasks"] == answers["models"][1]["tasks"]
    assert result["settings"]["tasks"] == answers["settings"]
    findings = verdict(*map(typed_model, result["models"]))
    told = {each.outcome: each.items for each in findings if each.subject == "accuracy"}
    assert told == {
        "worse": (
            "lambada -0.100 ± 0.010",
            "lambada, perplexity of the last word +22.1%, log +0.200 ± 0.050",
        )
    }


def test_tasks_of_few_documents_have_the_noise_of_few(write, answers):
    tasks = answers["models"][1]["tasks"]["lambada"]
    tasks["accuracy_difference"] |= {"stderr": 0.04, "samples": 4}  # 2.5 standard errors
    tasks["nats_difference"] |= {"samples": 3}  # 4 of them, where 4.3 hold 95%
    measured = without_tasks(synthetic_result("gates"))
    result = join([write("A.json", measured), write("tasks.json", answers)])
    findings = verdict(*map(typed_model, result["models"]))
    (found,) = (each for each in findings if each.subject == "accuracy")
    assert found.outcome == "same" and len(found.items) == 2


def test_tasks_of_other_documents_are_refused(write, answers):
    other = copy.deepcopy(answers)
    other["settings"] |= {"documents": {"piqa": 500}, "skipped": 500}
    for model in other["models"]:
        model["tasks"] = {"piqa": model["tasks"]["lambada"]}
    measured = without_tasks(synthetic_result("gates"))
    paths = [write("A.json", measured), write("a.json", answers), write("b.json", other)]
    with pytest.raises(UserError, match="skipped is 0 in one file, 500 in"):
        join(paths)


def test_tasks_of_other_models_or_alone_are_refused(write, answers):
    measured, alone = write("A.json", synthetic_result("gates")), write("tasks.json", answers)
    with pytest.raises(UserError, match="holds only tasks"):
        join([alone])
    answers["models"][1]["name"] = "other"
    with pytest.raises(UserError, match="has tasks of 'other'.*the models base, gates"):
        join([measured, write("other.json", answers)])
    answers["models"].reverse()
    with pytest.raises(UserError, match="has tasks of 'other'"):
        join([measured, write("reversed.json", answers)])


def test_tasks_of_two_runs_that_were_answered_beside_their_base_each_are_joined(write, answers):
    first, other = without_tasks(synthetic_result("gates")), copy.deepcopy(answers)
    first["models"].append(copy.deepcopy(first["models"][1]) | {"name": "more"})
    other["models"][1]["name"] = "more"
    of_base = other["models"][0]["tasks"]["lambada"]["accuracy"]
    of_base["value"] *= 1 + 1e-7
    paths = [write("A.json", first), write("a.json", answers), write("b.json", other)]
    found = join(paths)["models"]
    assert ["lambada" in model["tasks"] for model in found] == [True] * 3
    of_base["value"] = 0.4
    paths[2] = write("b.json", other)
    with pytest.raises(UserError, match="other figures of base in lambada.*leave one"):
        join(paths)


def test_tasks_of_a_base_in_another_form_are_refused(write, answers):
    measured = write("A.json", without_tasks(synthetic_result("gates")))
    answers["settings"]["base_quantization"] = "nf4"
    with pytest.raises(UserError, match="base_quantization.*None in the measurement, nf4 in"):
        join([measured, write("tasks.json", answers)])


def test_what_two_files_have_of_a_model_is_taken_whole(write):
    """The samples of one measurement say nothing of the score of another."""
    first, second = synthetic_result("a"), synthetic_result("b")
    scores = [
        result["models"][0]["long_context"]["tasks"]["niah_single"]["2048"]
        for result in (first, second)
    ]
    scores[0]["score"] = 0.2
    scores[1] |= {"score_by_sample": [1.0, 0.8], "prompts_sha256": "ab" * 32}
    base = join([write("A.json", first), write("B.json", second)])["models"][0]
    assert base["long_context"]["tasks"]["niah_single"]["2048"] == scores[0]


def test_a_loop_of_links_is_refused(tmp_path, write):
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="loop.json cannot be read"):
        join([write("A.json", synthetic_result("a")), loop])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("text_sha256", "ef" * 32),
        ("tokens_sha256", "ef" * 32),
        ("length", 256),
        ("windows", 4),
        ("dtype", "bfloat16"),
        ("base_quantization", "nf4"),
        ("base_revision", "v2"),
    ],
)
def test_another_text_is_refused_by_both_values(write, setting, value):
    first, second = synthetic_result("a"), synthetic_result("b")
    second["settings"][setting] = value
    if setting == "windows":
        for model in second["models"]:
            model["nll_by_window"] = model["nll_by_window"][:value]
    with pytest.raises(UserError) as error:
        join([write("A.json", first), write("B.json", second)])
    message = str(error.value)
    assert f"({setting})" in message and "\n" not in message
    assert f"{first['settings'].get(setting)} in " in message and f"{value} in " in message


def test_a_part_measured_differently_is_refused(write):
    first, second, third = (synthetic_result(name) for name in "abc")
    del first["settings"]["streaming"]
    third["settings"]["streaming"] = third["settings"]["streaming"] | {"cache": 256}
    paths = [write(f"{f}.json", r) for f, r in zip("ABC", (first, second, third), strict=True)]
    join(paths[:2])
    with pytest.raises(UserError, match="streaming was measured differently: cache is 512 in .*B"):
        join(paths)


def test_versions_may_differ_and_are_told(write):
    first, second = synthetic_result("a"), synthetic_result("b")
    second["settings"]["versions"]["torch"] = "2.14.0"
    settings = join([write("A.json", first), write("B.json", second)])["settings"]
    assert settings["versions"]["torch"] == "2.13.0 or 2.14.0"


def damaged(change):
    result = synthetic_result("a")
    change(result)
    return result


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"models": [', "is not JSON"),
        ("[1, 2]", "is not what this version of `retrofit measure --json` writes"),
        ({"models": [], "settings": {}}, "is not what this version"),
        ({"lm_eval": 1}, r"\(models: field required\)"),
        (damaged(lambda r: r["models"][1].pop("nll_by_window")), r"models.1.nll_by_window: field"),
        (damaged(lambda r: r["models"][0]["metrics"].pop("perplexity")), "metrics.perplexity"),
        (damaged(lambda r: r["models"][0]["nll_by_window"].pop()), "base has 7 windows"),
        (damaged(lambda r: r["settings"].pop("text_sha256")), "settings.text_sha256"),
    ],
)
def test_what_is_no_result_is_refused(write, content, message):
    with pytest.raises(UserError, match=message) as error:
        join([write("A.json", synthetic_result("a")), write("B.json", content)])
    assert "\n" not in str(error.value) and "B.json" in str(error.value)


def test_a_file_that_is_missing_or_given_twice_is_refused(write, tmp_path):
    path = write("A.json", synthetic_result("a"))
    with pytest.raises(UserError, match="nowhere.json cannot be read"):
        join([path, tmp_path / "nowhere.json"])
    with pytest.raises(UserError, match="A.json is given twice"):
        join([path, path])


def test_the_command_prints_and_writes(write, tmp_path):
    first, second = synthetic_result("a"), synthetic_result("b")
    for model in (*first["models"], *second["models"]):
        del model["examples"], model["long_context"]
    del second["models"][1]["streaming"]
    before = copy.deepcopy(first)
    paths = [str(write("A.json", first)), str(write("B.json", second))]
    page, figures = tmp_path / "page.html", tmp_path / "joined.json"
    done = CliRunner().invoke(
        cli.app, ["compare", *paths, "--report", str(page), "--json", str(figures)]
    )
    assert done.exit_code == 0, done.output
    assert "a: sink" in done.output and "b: sink" in done.output
    assert json.loads(figures.read_text()) == join([tmp_path / "A.json", tmp_path / "B.json"])
    assert json.loads((tmp_path / "A.json").read_text()) == before
    assert "2 models against base" in page.read_text()


def test_the_command_refuses_a_folder_that_is_not_there(write, tmp_path):
    path = write("A.json", synthetic_result("a"))
    missing = str(tmp_path / "none" / "page.html")
    done = CliRunner().invoke(cli.app, ["compare", str(path), "--report", missing])
    assert isinstance(done.exception, UserError) and "no folder" in str(done.exception)


def test_tasks_may_come_from_several_files(write, answers):
    measured = write("A.json", without_tasks(synthetic_result("gates")))
    other = json.loads(json.dumps(answers).replace("lambada", "piqa"))
    first, second = write("tasks.json", answers), write("others.json", other)
    result = join([measured, first, second])
    assert result["models"][1]["tasks"].keys() == {"lambada", "piqa"}
    assert result["settings"]["tasks"]["documents"] == {"lambada": 500, "piqa": 500}
    other["settings"]["dtype"] = "bfloat16"
    with pytest.raises(UserError, match="dtype is float32 in one file, bfloat16 in"):
        join([measured, first, write("rounded.json", other)])


def test_the_order_of_files_decides_only_the_first_base(write):
    """A model has its distance from the first base wherever a file has that."""
    a, b, c = (synthetic_result(name) for name in "abc")
    other = copy.deepcopy(c)
    other["models"][0]["name"] = "other"
    other["models"][0]["metrics"]["perplexity"] *= 2
    paths = [write(f"{name}.json", of) for name, of in zip("abco", (a, b, c, other), strict=True)]
    in_order = join(paths)
    for order in ([0, 3, 1, 2], [0, 3, 2, 1]):
        found = join([paths[index] for index in order])
        by_name = {model["name"]: model for model in found["models"]}
        for model in in_order["models"]:
            assert by_name[model["name"]] == model
        assert by_name["c"]["metrics"]["kl_to_base"] is not None


def test_a_base_that_another_file_measured_as_a_model_is_there_once(write):
    first, second = synthetic_result("b"), synthetic_result("c")
    second["models"][0] = copy.deepcopy(first["models"][1])
    result = join([write("A.json", first), write("B.json", second)])
    assert names(result) == ["base", "b", "c"]
    assert result["models"][1] == first["models"][1]
