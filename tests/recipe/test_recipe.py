"""Recipes: bundled ones load, and every mistake is named in one line."""

from pathlib import Path

import pytest
import yaml

from retrofit.recipe import Recipe, bundled_recipes, load_recipe, recipe_file
from retrofit.utils.errors import UserError

MINIMAL = {
    "output_dir": "runs/x",
    "model": {"base": "some/model"},
    "data": {"sources": [{"path": "text.jsonl"}]},
}


@pytest.fixture
def recipe_path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


@pytest.mark.parametrize("name", [name for name, _ in bundled_recipes()])
def test_bundled_recipes_load_and_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(str(resolved)) == recipe


@pytest.mark.parametrize("name", [name for name, _ in bundled_recipes()])
def test_bundled_recipes_say_how_they_are_run(name):
    text = recipe_file(name).read_text()
    assert text.startswith("# ")
    assert f"retrofit train {name.split('/')[-1]}" in text


def test_a_bundled_recipe_is_found_by_its_last_part():
    assert load_recipe("smollm2-135m-cpu") == load_recipe("llama/smollm2-135m-cpu")


@pytest.mark.parametrize("revision", ["1234e56", "1e5", "12", "true", "null", "2026-11-27"])
def test_a_revision_that_looks_like_something_else_is_read_as_it_was_written(
    recipe_path, tmp_path, revision
):
    recipe = load_recipe(recipe_path, [f"model.revision='{revision}'"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(str(resolved)).model.revision == revision


def test_overrides_are_yaml_values(recipe_path):
    recipe = load_recipe(
        recipe_path, ["train.max_steps=40", "gate.layers=[1, 2]", "measure={text: t.txt}"]
    )
    assert recipe.train.max_steps == 40
    assert recipe.gate.layers == [1, 2]
    assert recipe.measure.text == "t.txt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate.key_bias_turns=0.5", "key_bias_turns has no effect without key_bias"),
        (
            "gate={granularity: none, sinks: constant, activation: silu}",
            "activation and input_dependent are of a projection",
        ),
        ("train.max_step=4", "unknown key 'train.max_step'; did you mean 'max_steps'?"),
        ("modle={}", "unknown key 'modle'; did you mean 'model'?"),
        (
            "data.sources=[{path: a, wieght: 1}]",
            "unknown key 'data.sources.0.wieght'; did you mean 'weight'?",
        ),
        ("measure={text: a, lenght: 512}", "unknown key 'measure.lenght'; did you mean 'length'?"),
        ("train.max_steps=many", "train.max_steps: input should be a valid integer"),
        (
            "gate.granularity=head",
            "gate.granularity: input should be 'none', 'headwise', 'elementwise' or",
        ),
        ("objective.lm=0", "without lm some zero-initialized gates get no gradient"),
        ("data.streaming=true", "a stream has no end: set train.max_steps"),
        ("data.sources=[{path: a, weight: 1}, {path: b}]", "give every source a weight, or none"),
        ("data={sources: [{path: a}], first_tokens: 9, packing: false}", "ends of packed rows"),
        ("data.first_tokens=600", "more than half of data.sequence_length"),
        ("train.seed", "'train.seed' is not an override"),
        ("output_dir.x=1", "output_dir holds a value, not a section"),
        ("train.seed=[", "is not a YAML value"),
        ("gate.layers=[]", "gate.layers: list should have at least 1 item"),
        ("gate.layers=[-1]", "gate.layers.0: input should be greater than or equal to 0"),
        ("gate.layers=[true]", "gate.layers.0: input should be a valid integer, not True"),
        ("gate.layers=[1] # all", "is not a YAML value"),
        ("train.max_steps=True", "train.max_steps: input should be a valid integer, not True"),
        ("train.max_steps=4.0", "train.max_steps: input should be a valid integer, not 4.0"),
        ("train.max_steps='4'", "train.max_steps: input should be a valid integer, not '4'"),
        ("train.max_steps=4 # of 40", "input should be a valid integer, not '4 # of 40'"),
        ("train.save_steps=yes", "train.save_steps: input should be a valid integer, not True"),
        ("data.packing=1", "data.packing: input should be a valid boolean, not 1"),
        ("train.epochs=.inf", "train.epochs: input should be a finite number, not inf"),
        ("train.epochs=true", "train.epochs: input should be a valid number, not True"),
        ("train.epochs=1e999", "train.epochs: input should be a finite number, not inf"),
        ("objective.kl=.nan", "objective.kl: input should be a finite number, not nan"),
        ("objective.lm=.inf", "objective.lm: input should be a finite number, not inf"),
        ("train.learning_rate=.inf", "train.learning_rate: input should be 'auto' or a finite"),
        ("train.learning_rate=lots", "train.learning_rate: input should be 'auto' or a valid"),
        ("train.learning_rate=-1", "train.learning_rate: input should be 'auto' or greater than 0"),
        ("data.sources=[{path: a, weight: .inf}]", "data.sources.0.weight: input should be a fin"),
        ("train.seed=-1", "train.seed: input should be greater than or equal to 0, not -1"),
        ("train.seed=4294967296", "train.seed: input should be less than 4294967296"),
        ("measure={text: a, length: True}", "measure.length: input should be a valid integer"),
        ("train={seed: 1, seed: 2}", "is not a YAML value"),
        ("gate.layers=", "gate.layers: '' is not a YAML value; for none write null"),
        ("train.max_steps= ", "train.max_steps: ' ' is not a YAML value; for none write null"),
        ("objective.lm=1e300", "objective.lm: input should be less than or equal to 1000000"),
        ("objective.lm=1e-300", "set objective.lm to 1e-6 or more"),
        (
            "data.sources=[{path: a, weight: 1e-15}, {path: b, weight: 1}]",
            "one source has more than 10,000 times the weight of another",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(recipe_path, override, message):
    with pytest.raises(UserError) as raised:
        load_recipe(recipe_path, [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_key_that_is_gone_is_read_where_it_asked_for_nothing(recipe_path):
    recipe = load_recipe(recipe_path, ["objective={kl: 1, cache_teacher: false}"])
    assert recipe == load_recipe(recipe_path, ["objective={kl: 1}"])
    with pytest.raises(UserError, match="objective: cache_teacher is gone.*take it out") as raised:
        load_recipe(recipe_path, ["objective={kl: 1, cache_teacher: true}"])
    assert "\n" not in str(raised.value)


def test_pressure_on_rows_without_far_keys_is_refused(recipe_path):
    with pytest.raises(UserError, match="needs data.sequence_length of 128"):
        load_recipe(recipe_path, ["objective.pressure=1", "data.sequence_length=64"])
    with pytest.raises(UserError, match="data.first_tokens taken off"):
        overrides = ["objective.pressure=1", "data.sequence_length=128", "data.first_tokens=8"]
        load_recipe(recipe_path, overrides)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("runs/try #2", "runs/try #2"),
        ("#2", "#2"),
        (" runs/x ", "runs/x"),
        ("'runs/x # y'", "runs/x # y"),
        ("runs/c#", "runs/c#"),
    ],
)
def test_text_of_an_override_is_kept_whole(recipe_path, value, kept):
    assert load_recipe(recipe_path, [f"output_dir={value}"]).output_dir == kept


@pytest.mark.parametrize("value", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".1e-3"])
def test_a_number_may_be_written_as_people_write_it(recipe_path, value):
    assert load_recipe(recipe_path, [f"train.learning_rate={value}"]).train.learning_rate == 1e-4
    assert load_recipe(recipe_path, ["train.epochs=2"]).train.epochs == 2.0


@pytest.mark.parametrize("twice", ["train", "model", "output_dir"])
def test_a_key_that_is_there_twice_is_refused(recipe_path, twice):
    path = Path(recipe_path)
    section = yaml.safe_dump({twice: MINIMAL.get(twice, {"seed": 1})})
    path.write_text(path.read_text() + ("" if twice in MINIMAL else section) + section)
    with pytest.raises(UserError, match=f"is not YAML: '{twice}' is there twice") as raised:
        load_recipe(recipe_path)
    assert "\n" not in str(raised.value)


def test_a_key_twice_inside_a_section_is_refused(recipe_path):
    path = Path(recipe_path)
    path.write_text(path.read_text() + "train:\n  seed: 1\n  save_steps: 5\n  seed: 2\n")
    with pytest.raises(UserError, match="'seed' is there twice"):
        load_recipe(recipe_path)


def test_an_anchor_may_be_merged_and_overridden(recipe_path):
    path = Path(recipe_path)
    path.write_text(path.read_text() + "train: {<<: {seed: 1, save_steps: 5}, seed: 2}\n")
    assert load_recipe(recipe_path).train.seed == 2


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'smollm2-135m-cpu'"):
        load_recipe("smollm-135m-cpu")


def test_a_missing_section_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: x\nmodel: {base: y}\n")
    with pytest.raises(UserError, match="data is missing"):
        load_recipe(str(path))


@pytest.mark.parametrize("text", ["a: [", "- a list", ""])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is not (YAML|a recipe)"):
        load_recipe(str(path))


def test_defaults_are_those_of_the_schema():
    assert Recipe.model_validate(MINIMAL).objective.lm == 1.0
