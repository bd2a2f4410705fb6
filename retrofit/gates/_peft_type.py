"""`PeftType.G1_GATE`: the member that PEFT's closed enum lacks.

PEFT looks methods up by enum member and has no call that adds one, so the member is built the way
`enum` builds its own.
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
    # Enum classes forbid setting attributes; python >= 3.12 no longer finds members without one.
    type.__setattr__(PeftType, name, member)
    return member


# No base weight of any family has "g1_gate" in its name: transformers matches it as a substring.
G1_GATE = _add_member("G1_GATE")
