"""Adds the member `G1_GATE` to PEFT's closed enum `PeftType`.

PEFT looks methods up by enum member and has no function that adds one, so the member is built the
way `enum` builds its own.
"""

from peft.utils import PeftType


def _add_member(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    # Python 3.12 and later finds a member only as an attribute, which an enum class forbids to set.
    type.__setattr__(PeftType, name, member)
    return member


# transformers looks for this name in lower case as a substring of weight names. No base weight of
# any family contains "g1_gate".
G1_GATE = _add_member("G1_GATE")
