"""List the rooms of the package: their modules, their lines, and which room imports from which.

    python scripts/rooms.py

The rows have the order of pyproject.toml, to which `make lint` holds the imports. `adapters/` is
not among them because it is outside the package and imports nothing from it, which
tests/export/test_travelling_code.py checks.
"""

import re
import tomllib
from collections import Counter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent


def rooms() -> list[str]:
    """Returns the names of the rooms, from the top down."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return [room for layer in contract["layers"] for room in re.findall(r"\w+", layer)]


def main() -> None:
    graph = grimp.build_graph("retrofit", cache_dir=None)
    room_of = {module: module.split(".")[1] for module in graph.modules if "." in module}
    imports = Counter(
        (room, room_of[imported])
        for module, room in room_of.items()
        for imported in graph.find_modules_directly_imported_by(module)
        if imported in room_of and room_of[imported] != room
    )
    order = [room for room in rooms() if room in room_of.values()]
    print("| room | modules | lines | imports from, and by how many modules |")
    print("|---|--:|--:|---|")
    for room in order:
        files = [path_of(module) for module, its_room in room_of.items() if its_room == room]
        lines = sum(len(path.read_text().splitlines()) for path in files)
        below = [f"{other} {imports[room, other]}" for other in order if imports[room, other]]
        print(f"| {room} | {len(files)} | {lines:,} | {', '.join(below) or 'nothing'} |")


def path_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


if __name__ == "__main__":
    main()
