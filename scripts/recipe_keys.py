"""Print the table of docs/recipe.md, which lists every key of a recipe.

python scripts/recipe_keys.py
"""

from retrofit.recipe import recipe_keys


def table() -> str:
    rows = [["key", "values", "default", "meaning"], ["---"] * 4]
    for key in recipe_keys():
        default = "required" if key.default is None else f"`{key.default}`"
        rows.append([f"`{key.name}`", key.values, default, key.meaning.replace("|", "\\|")])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")
