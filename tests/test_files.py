"""What appears whole, and what is tidied up beside it."""

import pytest

from retrofit.files import appearing_whole


@pytest.mark.parametrize("name", ["*", "?ut", "[o]ut", "o*"])
def test_a_name_is_no_pattern_for_what_is_tidied_up(tmp_path, name):
    others = [".out.partial-4194999", ".out.partial-mine"]
    for other in [*others, f".{name}.partial-4194999"]:
        (tmp_path / other).mkdir()
    with appearing_whole(tmp_path / name):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, name])
