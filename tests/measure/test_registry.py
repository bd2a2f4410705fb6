"""Evaluations are chosen by name, with the settings that a user gives them."""

import re

import pytest

from retrofit.measure.registry import EVALUATIONS, chosen_evaluations, names_in
from retrofit.utils.errors import UserError


def test_settings_of_parts_are_read_as_their_types():
    streaming, heads = chosen_evaluations(
        ["streaming", "heads"], ["streaming.cache=256", "heads.shares=[0.2, 0.4]"]
    )
    assert (streaming.cache, streaming.sinks, heads.shares) == (256, 4, (0.2, 0.4))
    assert chosen_evaluations([]) == []
    assert {part.name for part in chosen_evaluations(list(EVALUATIONS))} == set(EVALUATIONS)
    assert names_in("streaming, long-context") == ["streaming", "long_context"] and not names_in("")
    with pytest.raises(UserError, match="--parts heads,steaming: .* did you mean streaming"):
        names_in("heads,steaming")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("streaming.cach=2", "did you mean streaming.cache?"),
        ("cache", "write PART.OPTION=VALUE"),
        ("heads.seed=1", "add --heads"),
        ("streaming.cache=many", "streaming.cache: input should be a valid integer"),
        ("streaming.windows=0", "streaming.windows: input should be greater than 0"),
        ("streaming.cache=[", "is not a value"),
        ("streaming.cache=", "is not a value"),
        ("streaming.sinks=true", "streaming.sinks: input should be a valid integer"),
        ("streaming.sinks='4'", "streaming.sinks: input should be a valid integer"),
        ("streaming.cache=2024-01-01", "streaming.cache: input should be a valid integer"),
    ],
)
def test_wrong_settings_are_told(setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        chosen_evaluations(["streaming"], [setting])


@pytest.mark.parametrize("name", ["heads.shares", "long_context.tasks", "long_context.lengths"])
def test_an_evaluation_of_nothing_is_refused(name):
    with pytest.raises(UserError, match=f"{name}: tuple should have at least 1 item"):
        chosen_evaluations([name.split(".")[0]], [f"{name}=[]"])
