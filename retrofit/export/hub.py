"""Publishes a merged checkpoint on the Hugging Face hub."""

import shlex
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi

# `HTTPError` is the base class of the HTTP library that the installed version is built on.
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from retrofit.utils.errors import UserError, one_line
from retrofit.utils.files import FURTHER_TEMPLATES, TOKENIZER_FILES

# The files that a checkpoint consists of. One that is left from an earlier push may be loaded
# instead of what is pushed: model.safetensors is preferred to shards, chat_template.jinja to the
# template in tokenizer_config.json, and the base of an adapter to the model beside it.
_CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "adapter_config.json",
    *TOKENIZER_FILES,
    f"{FURTHER_TEMPLATES}/*",
)


def check_access(repo_id: str) -> None:
    """Checks a repository's name and the login before hours of work.

    Raises:
        UserError: if the name is invalid, nobody is logged in, or the hub does not answer.
    """
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("the name of a repository without its owner")
        HfApi().whoami()
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name of a hub repository, as OWNER/NAME is") from error
    except LocalTokenNotFoundError as error:
        raise UserError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN") from error
    except (HTTPError, OSError) as error:
        raise UserError(f"the hub does not answer, or not to you: {one_line(error)}") from error


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads a finished folder and returns its address on the hub.

    A checkpoint that the repository holds is replaced by another: those of its files that the new
    one lacks are deleted. All other files stay, and everything stays if the folder is of a GGUF
    file.

    Raises:
        UserError: if the upload fails. The folder stays as it is, and the message says how to go
            on.
    """
    api, is_model = HfApi(), (folder / "config.json").is_file()  # a GGUF file has no config
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="retrofit merge",
            delete_patterns=_published_checkpoint(api, repo_id) if is_model else None,
        )
    except (HTTPError, OSError) as error:
        command = ["hf", "upload", repo_id, str(folder)]
        command += ["--private"] if private else []
        command += ["--delete", "model*.safetensors"] if is_model else []
        raise UserError(
            f"{folder} is merged, but not pushed ({one_line(error)}); go on with "
            f"`{shlex.join(command)}`"
        ) from error
    return str(url)


def _published_checkpoint(api: HfApi, repo_id: str) -> list[str]:
    """Returns patterns for the files of a repository that belong to a checkpoint.

    Each pattern matches one file, because a `*` in a pattern of the hub also matches a `/`.
    """
    return [
        escape(file)
        for file in api.list_repo_files(repo_id)
        for pattern in _CHECKPOINT_FILES
        if fnmatchcase(file, pattern) and file.count("/") == pattern.count("/")
    ]
