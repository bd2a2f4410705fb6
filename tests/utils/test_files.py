"""What appears whole, and what is tidied up beside it."""

import pytest

from retrofit.utils.errors import UserError
from retrofit.utils.files import atomic_folder, write_json, writing


@pytest.mark.parametrize("name", ["*", "?ut", "[o]ut", "o*"])
def test_a_name_is_no_pattern_for_what_is_tidied_up(tmp_path, name):
    others = [".out.partial-4194999", ".out.partial-mine"]
    for other in [*others, f".{name}.partial-4194999"]:
        (tmp_path / other).mkdir()
    with atomic_folder(tmp_path / name):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_is_what_every_reader_takes(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("message", "expected"),
    [("No space left on device (os error 28)", UserError), ("no such token", Exception)],
)
def test_a_full_disk_under_a_tokenizer_is_one_line(tmp_path, message, expected):
    """The tokenizers library raises a bare Exception, which may be about something else."""
    error = Exception(message)
    with pytest.raises(expected, match=message[:10]) as raised, writing(tmp_path):
        raise error
    assert type(raised.value) is expected
