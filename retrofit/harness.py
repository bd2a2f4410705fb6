"""Opens bases, runs, adapters and merged checkpoints in lm-evaluation-harness, as `retrofit`.

    python -m retrofit.harness --model retrofit --model_args pretrained=RUN --tasks hellaswag

takes the arguments of `lm_eval`. Importing this module registers the model name `retrofit` there,
and lm-evaluation-harness has no other way to add a model. It needs the extra `tasks`.
"""

import sys
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from retrofit.models.loading import load_model
from retrofit.recipe import Dtype, Quantization
from retrofit.utils.errors import UserError
from retrofit.utils.process import prepare_process


@register_model("retrofit")
class RetrofitLM(HFLM):
    """A model that `load_model` opens, in one process and on one device.

    Args:
        pretrained: a run folder, an adapter folder, a checkpoint folder or a hub id.
        dtype: the dtype of the base weights; `auto` keeps that of the run, or the stored one.
        trust_remote_code: run the code that a checkpoint brings.
        quantization: hold the base weights in this form instead of the one that a run names.
        revision: a branch, tag or commit of a hub id.
        device: where to compute; `None` is the GPU if there is one.
        kwargs: the arguments of `HFLM`. Log-likelihoods are computed in float32 unless
            `softmax_dtype` says otherwise.

    Raises:
        UserError: as `load_model`.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Dtype = "auto",
        trust_remote_code: bool = False,
        quantization: Quantization | None = None,
        revision: str | None = None,
        device: str | None = None,
        **kwargs: Any,
    ):
        model, tokenizer = load_model(pretrained, dtype, trust_remote_code, quantization, revision)
        # Without a device from the user, lm_eval passes the first GPU even if there is none.
        if device and (torch.cuda.is_available() or not device.startswith("cuda")):
            with suppress(ValueError):  # a quantized model cannot be moved
                model.to(torch.device(device))
        arguments = {"backend": "causal", "softmax_dtype": "float32"} | kwargs
        super().__init__(model, tokenizer=tokenizer, **arguments)


def choice_task(name: str, documents: Path) -> dict[str, Any]:
    """Returns the config of a task in which one of several continuations is right, as in HellaSwag,
    ARC and PIQA.

    Args:
        name: the name of the task.
        documents: a .jsonl file with `context`, `choices` and `gold`, the number of the right
            choice, in each line; a choice follows the context after one blank.

    Returns:
        A config for `TaskManager.load` or, as YAML, for a folder of `--include_path`.
    """
    return _task(name, documents) | {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [_mean_of("acc"), _mean_of("acc_norm")],
    }


def last_word_task(name: str, documents: Path) -> dict[str, Any]:
    """Returns the config of a task in which the last word of a passage is missing, as in LAMBADA.

    Args:
        name: the name of the task.
        documents: a file as for `choice_task`, with one choice in each line.

    Returns:
        A config as that of `choice_task`.
    """
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    return _task(name, documents) | {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + choices[0]}}",
        "metric_list": [perplexity, _mean_of("acc")],
    }


def _task(name: str, documents: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        # datasets treats the path as a glob pattern.
        "dataset_kwargs": {"data_files": {"test": escape(str(documents))}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def _mean_of(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _quoted(argument: str) -> str:
    """Quotes the path in `pretrained=PATH`, because lm-evaluation-harness would split it at commas
    and turn digits into a number."""
    path = argument.removeprefix("pretrained=")
    is_path = path != argument and Path(path).exists()
    return f"pretrained={path!r}" if is_path else argument


def main() -> int:
    prepare_process(keep_freed_memory=True)
    sys.argv[1:] = map(_quoted, sys.argv[1:])
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
