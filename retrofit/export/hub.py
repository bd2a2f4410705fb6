"""Publishes a merged checkpoint on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from retrofit.utils.errors import UserError, one_line


def check_access(repo_id: str) -> None:
    """Checks a repository's name and the login before hours of work.

    Raises:
        UserError: if the name is invalid, nobody is logged in, or the hub does not answer.
    """
    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name of a hub repository, as OWNER/NAME is") from error
    except LocalTokenNotFoundError as error:
        raise UserError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"the hub does not answer, or not to you: {one_line(error)}") from error


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Uploads a finished folder and returns its address on the hub.

    Raises:
        UserError: if the upload fails. The folder stays as it is, and the message says how to go
            on.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="retrofit merge")
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{folder} is merged, but not pushed ({one_line(error)}); go on with "
            f"`hf upload {repo_id} {folder}`"
        ) from error
    return str(url)
