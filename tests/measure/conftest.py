"""A text to measure on."""

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(bytes(97 + (i * i * 7 + i) % 26 for i in range(900)).decode())
    return path
