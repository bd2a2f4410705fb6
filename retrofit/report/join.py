"""Results of several measurements as one, where they can be compared."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retrofit.report.result import TaskResult, typed_result
from retrofit.report.sections import PARTS
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import read_json

# What must be equal for two figures to be of the same thing.
_TEXT = {
    "text_sha256": "the text",
    "length": "the tokens a window",
    "windows": "the windows",
    "tokens_sha256": "the tokens",
}
_SAME = 1e-5  # relative: the order of sums depends on the number of threads


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of `retrofit measure --json` in these files as one: the first file's first model
    is the base.

    A model that several files share is there once, with the parts that any of them has. Of models
    with another base, what was measured against that one is left out. Files of `scripts/tasks.py`
    after the first add what their models are right in to the models of the same names.

    Raises:
        UserError: if a file is not such a result or given twice, or the text or a part's settings
            differ.
    """
    for place, path in enumerate(paths):
        if path.resolve() in [each.resolve() for each in paths[:place]]:
            raise UserError(f"{path} is given twice")
    read = {path: read_result(path) for path in paths}
    answers = {
        path: result for path, result in read.items() if "per_layer" not in result["models"][0]
    }
    paths = [path for path in paths if path not in answers]
    if not paths:
        raise UserError(f"{next(iter(answers))} holds tasks alone; name a measurement too")
    joined = _join(paths, [read[path] for path in paths])
    for path, result in answers.items():
        _add_tasks(joined, path, result)
    try:
        typed_result(joined)
    except ValidationError as error:
        raise UserError(
            f"the files do not belong together ({validation_problem(error)})"
        ) from error
    return joined


def _join(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for path, result in zip(paths[1:], results[1:], strict=True):
        _check_text(paths[0], results[0]["settings"], path, result["settings"])
    _check_parts(paths, [result["settings"] for result in results])
    models: list[tuple[str, dict[str, Any]]] = []
    bases: list[dict[str, Any]] = []
    for label, result in zip(_labels(paths), results, strict=True):
        base, *others = result["models"]
        known = next((each for each in bases if _same(each, base)), None)
        of_another = bool(bases) and known is not bases[0]
        if known is None:
            known = _without_base(base) if of_another else dict(base)
            bases.append(known)
            models.append((label, known))
        else:
            _complete(known, base)
        for each in others:
            each = _without_base(each) if of_another else dict(each)
            twin = next((other for _, other in models if _same(other, each)), None)
            if twin is None:
                models.append((label, each))
            else:
                _complete(twin, each)
    settings = _together([result["settings"] for result in results])
    return {"models": _named(models), "settings": settings}


def _complete(model: dict[str, Any], twin: dict[str, Any]) -> None:
    """Add the parts, and the always measured figures, that only the twin has."""
    for key in ("metrics", "per_layer"):
        model[key] = twin[key] | model[key]
    model |= {part: twin[part] for part in twin if part not in model}


def _add_tasks(joined: dict[str, Any], path: Path, result: dict[str, Any]) -> None:
    by_name = {model["name"]: model for model in joined["models"]}
    base = joined["models"][0]["name"]
    for number, model in enumerate(result["models"]):
        if model["name"] not in by_name or (number == 0 and model["name"] != base):
            raise UserError(
                f"{path} has tasks of {model['name']!r} beside {base!r}, the first of what was "
                f"measured; give it the models {', '.join(by_name)} in this order"
            )
        by_name[model["name"]]["tasks"] = model["tasks"]
    settings = result["settings"]
    joined["settings"]["tasks"] = {key: settings[key] for key in ("documents", "seed", "dtype")}


def read_result(path: Path) -> dict[str, Any]:
    """A file of `retrofit measure --json` or of `scripts/tasks.py --out`.

    Raises:
        UserError: if it is none.
    """
    try:
        result = read_json(path)
        settings = result.get("settings") if isinstance(result, dict) else None
        is_of_tasks = isinstance(settings, dict) and "documents" in settings
        check = TaskResult.model_validate if is_of_tasks else typed_result
        check(result)
        json.dumps(result, ensure_ascii=False).encode()  # half a character cannot be shown
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise UserError(
            f"{path} is not what this version of `retrofit measure --json` writes "
            f"({validation_problem(error)}); measure again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON, or not all of it: {error}") from error
    return result


def _check_text(first: Path, settings: dict, path: Path, others: dict) -> None:
    for key, what in _TEXT.items():
        if settings[key] != others[key]:
            raise UserError(
                f"{what} ({key}) differs, and figures cannot be compared: {settings[key]} in "
                f"{first}, {others[key]} in {path}"
            )


def _check_parts(paths: Sequence[Path], settings: Sequence[dict[str, Any]]) -> None:
    """Each part against the first file that has it."""
    seen: dict[str, tuple[Path, dict]] = {}
    for path, everything in zip(paths, settings, strict=True):
        for part, own in everything.items():
            if part == "versions" or not isinstance(own, dict):
                continue
            first, expected = seen.setdefault(part, (path, own))
            for option in expected | own:
                before, after = expected.get(option), own.get(option)
                if before != after:
                    raise UserError(
                        f"{part} was measured differently: {option} is {before} in {first}, "
                        f"{after} in {path}"
                    )


def _same(base: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two models are one, whatever they were compared with."""
    before, after = base["metrics"], other["metrics"]
    # An older version wrote fewer.
    names = (before.keys() & after.keys()) - {"kl_to_base"}
    return base["name"] == other["name"] and all(
        _close(before[name], after[name]) for name in names
    )


def _close(before: float | None, after: float | None) -> bool:
    if before is None or after is None:
        return before is after
    return math.isclose(before, after, rel_tol=_SAME, abs_tol=1e-9)


def _without_base(model: dict[str, Any]) -> dict[str, Any]:
    """Without what was measured against a base that is not this comparison's."""
    model = model | {"metrics": model["metrics"] | {"kl_to_base": None}}
    for part in PARTS:
        if part.against_base and part.name in model:
            model[part.name] = _pruned(model[part.name], part.against_base)
    return model


def _pruned(figures: Any, ending: str) -> Any:
    if not isinstance(figures, dict):
        return figures
    return {k: _pruned(v, ending) for k, v in figures.items() if not k.endswith(ending)}


def _labels(paths: Sequence[Path]) -> list[str]:
    """What tells the files apart: the stem, or the path where stems are equal."""
    stems = [path.stem for path in paths]
    return [
        path.stem if stems.count(path.stem) == 1 else str(path.with_suffix("")) for path in paths
    ]


def _named(models: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    names = [model["name"] for _, model in models]
    return [
        model if names.count(model["name"]) == 1 else model | {"name": f"{label}/{model['name']}"}
        for label, model in models
    ]


def _together(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All settings; where they differ without harm, such as versions, each one of them."""
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in settings for key in each):
        values = [each[key] for each in settings if key in each]
        if key == "sources":
            joined[key] = list(dict.fromkeys(source for value in values for source in value))
        elif key == "versions":
            joined[key] = _together(values)
        else:
            different = [v for place, v in enumerate(values) if v not in values[:place]]
            joined[key] = " or ".join(map(str, different)) if len(different) > 1 else values[0]
    return joined
