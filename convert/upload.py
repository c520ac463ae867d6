"""Putting a converted model on the hub: the only lines that write to anywhere but the disk."""

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mlx_mcsd.errors import MCSDError
from mlx_mcsd.loading import one_line

# Of the HTTP library below the hub's client, whichever that is.
HTTPError = HfHubHTTPError.__mro__[1]


def check_repo(repo):
    """Refuse what can be no repository's name, before any work."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise MCSDError(f"[upload] --upload-repo must be owner/name: {one_line(error)}") from None
    if "/" not in repo:
        raise MCSDError(f"[upload] --upload-repo must be owner/name but is {repo!r}.")


def upload(directory, repo):
    """Upload a directory, card and all.

    `mlx_lm.utils.upload_to_hub` would write its own card, which tells people to install mlx-lm
    alone, and calls what version 2 of the hub's client no longer has.

    Args:
        directory: of a converted model, complete.
        repo: "owner/name"; made if it is not there.

    Raises:
        MCSDError: if the hub refuses or cannot be reached; the directory stays.
    """
    try:
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=str(directory), repo_id=repo, repo_type="model")
    except (OSError, HTTPError, HFValidationError) as error:
        raise MCSDError(
            f"[upload] {directory} is written but could not be uploaded to {repo}: "
            f"{one_line(error)}"
        ) from None
