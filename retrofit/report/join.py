"""Joins the results of several measurements into one, if they can be compared."""

import json
import math
from collections.abc import Sequence
from os.path import realpath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retrofit.report.result import TaskResult, typed_result
from retrofit.report.sections import PARTS
from retrofit.utils.errors import UserError, validation_problem
from retrofit.utils.files import read_json

# How the base was opened, which tasks have to agree with as well.
_OF_BASE = {
    "base_quantization": "the form of the base's weights",
    "base_revision": "the revision of the base",
}
# Two results can be compared only if these settings are equal.
_COMPARED = {
    "text_sha256": "the text",
    "length": "the tokens a window",
    "windows": "the windows",
    "tokens_sha256": "the tokens",
    "dtype": "the dtype",
    **_OF_BASE,
}
_SAME = 1e-5  # relative difference: the order of sums depends on the number of threads


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """Joins files of `retrofit measure --json` into one result. The base is the first model of the
    first file.

    A model that several files share appears once, with the parts that any of the files has. Figures
    that were measured against another base are left out. Files of `scripts/tasks.py` add their
    accuracies to the models of the same names.

    Raises:
        UserError: if a file is not such a result or is given twice, or if the text or the settings
            of a part differ.
    """
    for place, path in enumerate(paths):
        if realpath(path) in map(realpath, paths[:place]):
            raise UserError(f"{path} is given twice")
    results = {path: read_result(path) for path in paths}
    task_results = {
        path: result for path, result in results.items() if "per_layer" not in result["models"][0]
    }
    paths = [path for path in paths if path not in task_results]
    if not paths:
        raise UserError(f"{next(iter(task_results))} holds only tasks; name a measurement too")
    joined = _join(paths, [results[path] for path in paths])
    for path, result in task_results.items():
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
        _check_same_settings(_COMPARED, paths[0], results[0]["settings"], path, result["settings"])
    _check_parts(paths, [result["settings"] for result in results])
    first_base = results[0]["models"][0]
    models: list[tuple[str, dict[str, Any]]] = []
    for label, result in zip(_labels(paths), results, strict=True):
        has_first_base = _same(first_base, result["models"][0])
        for model in result["models"]:
            model = dict(model) if has_first_base else _without_base(model)
            twin = next((known for _, known in models if _same(known, model)), None)
            if twin is None:
                models.append((label, model))
            else:
                twin |= _completed(twin, model)
    settings = _joined_settings([result["settings"] for result in results])
    return {"models": _named(models), "settings": settings}


def _completed(model: dict[str, Any], twin: dict[str, Any]) -> dict[str, Any]:
    """Returns a model with the metrics and the parts that only its twin has."""
    completed = twin | _known(model)
    for group in ("metrics", "per_layer"):
        completed[group] = twin[group] | _known(model[group])
    for part in PARTS:
        if part.against_base and part.name in model and part.name in twin:
            completed[part.name] = _with_differences(
                model[part.name], twin[part.name], part.against_base
            )
    return completed


def _known(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if value is not None}


def _with_differences(figures: Any, twin: Any, ending: str) -> Any:
    """Returns figures with those of a twin that were measured against the base, which
    `_without_base` may have taken away."""
    if not isinstance(figures, dict) or not isinstance(twin, dict):
        return figures
    added = {key: twin[key] for key in twin.keys() - figures.keys() if key.endswith(ending)}
    both = {key: _with_differences(figures[key], twin.get(key), ending) for key in figures}
    return both | added


def _add_tasks(joined: dict[str, Any], path: Path, result: dict[str, Any]) -> None:
    by_name = {model["name"]: model for model in joined["models"]}
    base = joined["models"][0]["name"]
    for number, model in enumerate(result["models"]):
        if model["name"] not in by_name or (number == 0 and model["name"] != base):
            raise UserError(
                f"{path} has tasks of {model['name']!r} beside {base!r}, the first of what was "
                f"measured; give it the models {', '.join(by_name)} in this order"
            )
        tasks = by_name[model["name"]].setdefault("tasks", {})
        for task in sorted(tasks.keys() & model["tasks"].keys()):
            if not _alike(tasks[task], model["tasks"][task]):
                raise UserError(
                    f"{path} has other figures of {model['name']} in {task} than another file; "
                    "leave one of the two out"
                )
        tasks |= model["tasks"]
    _check_same_settings(_OF_BASE, "the measurement", joined["settings"], path, result["settings"])
    settings = {key: result["settings"][key] for key in ("documents", "seed", "dtype")}
    if skipped := result["settings"].get("skipped", 0):
        settings["skipped"] = skipped
    known = joined["settings"].setdefault("tasks", settings)
    for key in ("seed", "dtype", "skipped"):
        if (before := known.get(key, 0)) != (after := settings.get(key, 0)):
            raise UserError(
                f"tasks were measured differently: {key} is {before} in one file, {after} in {path}"
            )
    known["documents"] = known["documents"] | settings["documents"]


def read_result(path: Path) -> dict[str, Any]:
    """Reads a file of `retrofit measure --json` or of `scripts/tasks.py --out`.

    Raises:
        UserError: if the file is neither.
    """
    try:
        result = read_json(path)
        settings = result.get("settings") if isinstance(result, dict) else None
        is_of_tasks = isinstance(settings, dict) and "documents" in settings
        check = TaskResult.model_validate if is_of_tasks else typed_result
        check(result)
        # A lone surrogate could not be printed.
        json.dumps(result, ensure_ascii=False).encode()
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


def _check_same_settings(
    compared: dict[str, str], first: Any, settings: dict, path: Path, others: dict
) -> None:
    for key, what in compared.items():
        if (before := settings.get(key)) != (after := others.get(key)):
            raise UserError(
                f"{what} ({key}) differs, and figures cannot be compared: {before} in {first}, "
                f"{after} in {path}"
            )


def _check_parts(paths: Sequence[Path], settings: Sequence[dict[str, Any]]) -> None:
    """Compare the settings of each part with those of the first file that has the part."""
    first_of_part: dict[str, tuple[Path, dict]] = {}
    for path, file_settings in zip(paths, settings, strict=True):
        for part, options in file_settings.items():
            if part == "versions" or not isinstance(options, dict):
                continue
            first, expected = first_of_part.setdefault(part, (path, options))
            for option in expected | options:
                before, after = expected.get(option), options.get(option)
                if before != after:
                    raise UserError(
                        f"{part} was measured differently: {option} is {before} in {first}, "
                        f"{after} in {path}"
                    )


def _same(base: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tells whether two entries are the same model, whichever base they were compared with."""
    before, after = base["metrics"], other["metrics"]
    # Only shared metrics are compared, because older versions wrote fewer.
    names = (before.keys() & after.keys()) - {"kl_to_base"}
    return base["name"] == other["name"] and all(
        _close(before[name], after[name]) for name in names
    )


def _alike(figures: Any, others: Any) -> bool:
    """Tells whether two records have the same figures under the names that both have."""
    if isinstance(figures, dict):
        return all(_alike(figures[key], others[key]) for key in figures.keys() & others.keys())
    return _close(figures, others)


def _close(before: float | None, after: float | None) -> bool:
    if before is None or after is None:
        return before is after
    return math.isclose(before, after, rel_tol=_SAME, abs_tol=1e-9)


def _without_base(model: dict[str, Any]) -> dict[str, Any]:
    """Returns the model without the figures that were measured against its base."""
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
    """Returns a label for each file: its stem, or its path if another file has the same stem."""
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


def _joined_settings(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns all settings. A setting that may differ, such as a version, lists its values."""
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for file_settings in settings for key in file_settings):
        values = [file_settings[key] for file_settings in settings if key in file_settings]
        if key == "sources":
            joined[key] = list(dict.fromkeys(source for value in values for source in value))
        elif key == "versions":
            joined[key] = _joined_settings(values)
        else:
            different = [value for place, value in enumerate(values) if value not in values[:place]]
            joined[key] = " or ".join(map(str, different)) if len(different) > 1 else values[0]
    return joined
