"""A tokenizer that transformers reads otherwise than its file says is refused at the door."""

import json

import pytest
from made_runs import make_run
from tiny import tiny_model, tiny_tokenizer

from retrofit.export.merge import merge
from retrofit.models.loading import load_model, load_tokenizer
from retrofit.recipe import Model
from retrofit.utils.errors import UserError

REFUSED = "Qwen2Tokenizer of it, with another .*pre_tokenizer.*cuts text into other tokens"


@pytest.fixture
def base(tmp_path):
    """`base("qwen2")` has a tokenizer with a token for "12", which Qwen never has."""

    def build(model_type):
        folder = tmp_path / "base"
        tiny_model(model_type).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        path = folder / "tokenizer.json"
        told = json.loads(path.read_text())
        told["model"] |= {"vocab": told["model"]["vocab"] | {"12": 259}, "merges": [["1", "2"]]}
        path.write_text(json.dumps(told))
        return folder

    return build


def test_parts_that_transformers_swaps_are_named(base):
    folder = base("qwen2")
    with pytest.raises(UserError, match=REFUSED) as raised:
        load_tokenizer(Model(base=str(folder)))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=REFUSED):
        load_model(str(folder))


def test_a_merge_names_them_too_and_leaves_nothing(base, tmp_path):
    run = make_run(tmp_path / "run", base("qwen2"))
    with pytest.raises(UserError, match=REFUSED):
        merge(run, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_file_that_is_read_as_it_stands_is_fine(base):
    tokenizer = load_tokenizer(Model(base=str(base("llama"))))
    assert 259 in tokenizer("In 1212")["input_ids"]


def test_a_damaged_file_is_one_line(base):
    folder = base("llama")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="damaged") as raised:
        load_tokenizer(Model(base=str(folder)))
    assert "\n" not in str(raised.value)
