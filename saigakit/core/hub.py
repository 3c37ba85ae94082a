"""Download from and upload to the Hugging Face Hub, with errors that say what to do."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from saigakit.core import workspace
from saigakit.core.files import sha256
from saigakit.core.lazy import huggingface_hub
from saigakit.errors import SaigaError, hide, masked

_TOKENS = "https://huggingface.co/settings/tokens"
REPO = "HF_REPO"  # the secret owner/name: publish.if_asked pushes to owner/name_lora and owner/name_gguf
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
Hashes = Mapping[str, str] | None  # by file name
print_once = cache(lambda line: print(line, flush=True))
_ATTACH = {
    "model": "Or attach a copy as a Kaggle model or data set and give its directory as base_source (for an adapter: as "
    "adapter).",
    "dataset": "It is not a local path either: attach a copy as a Kaggle data set and give its name or a path in it.",
}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form owner/name that the Hub allows."""
    return _HUB_ID.fullmatch(name) is not None


def snapshot(
    repo: str, patterns: tuple[str, ...], repo_type: str = "model", revision: str | None = None, recorded: Hashes = None
) -> Path:
    """Download the matching files into the cache, and return their directory, which is named after the commit."""
    kept = list(patterns)
    with download_errors_explained(repo, repo_type):
        found = huggingface_hub.snapshot_download(
            repo, repo_type=repo_type, revision=revision, allow_patterns=kept, cache_dir=cache_dir(), token=token()
        )
    directory = Path(found)
    if revision != directory.name:
        print_once(f"{repo}: {revision or 'main'} is commit {directory.name}.")
    for name, expected in (recorded or {}).items():
        if (directory / name).is_file():
            verified_sha256(directory / name, expected)
    return directory


def verified_sha256(file: Path, expected: str | None = None) -> str:
    """Raises SaigaError if it is not `expected`, or not that by which the Hub's client has named a large file."""
    found, blob = sha256(file), file.resolve()
    expected = expected or (blob.name if blob.parent.name == "blobs" and len(blob.name) == 64 else found)
    if found != expected:
        raise SaigaError(
            f"{file} is damaged or another file: its SHA-256 is {found}, not {expected}. Delete {blob} and try again."
        )
    return found


def list_files(repo: str, repo_type: str = "model", revision: str | None = None) -> tuple[str, dict[str, int]]:
    """The commit of `revision`, and bytes by file name."""
    # Not list_repo_files, which keeps trying for 24 s without a connection.
    api = huggingface_hub.HfApi(token=token())
    with download_errors_explained(repo, repo_type):
        ask = api.model_info if repo_type == "model" else api.dataset_info
        found = ask(repo, revision=revision, files_metadata=True)
    return str(found.sha), {file.rfilename: file.size or 0 for file in found.siblings or []}


def require_room(repo: str, repo_type: str, needed: int) -> None:
    """Raise SaigaError if the disk cannot hold what is not downloaded yet of `needed` bytes."""
    folder = huggingface_hub.file_download.repo_folder_name(repo_id=repo, repo_type=repo_type)
    blobs = cache_dir() / folder / "blobs"
    there = sum(blob.stat().st_size for blob in blobs.glob("*"))
    workspace.require_disk(cache_dir(), max(0, needed - there), f"Downloading {repo}")


def cache_dir() -> Path:
    return workspace.scratch_dir() / "hub"


@contextmanager
def download_errors_explained(repo: str, repo_type: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
        return
    except errors.GatedRepoError:
        problem = f"{repo} is gated: accept its licence on its Hub page and set the secret HF_TOKEN."
    except errors.RepositoryNotFoundError:
        problem = f"{repo} is not on the Hub, or HF_TOKEN has no access to it or has expired."
    except errors.RevisionNotFoundError:
        problem = f"{repo} has no revision of that name: give a branch, a tag or a commit."
    # HTTPError is httpx's in huggingface_hub 1 and httpx2's in 2. Without a connection it is raised too, not OSError.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and workspace.is_full(error):
            raise workspace.disk_full(f"Downloading {repo}", 0) from None
        problem = f"{repo} could not be fetched from the Hub: {_reason(error)}. On Kaggle, switch Internet on."
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
            problem = f"{repo} could not be fetched. {_refusal(401, repo, '')}"
    raise SaigaError(f"{problem} {_ATTACH[repo_type]}") from None


def token() -> str | None:
    """HF_TOKEN from the environment or Kaggle's secrets, else the token that `hf auth login` stored."""
    found = workspace.secret("HF_TOKEN") or (huggingface_hub.get_token() or "").strip()
    hide(found)
    if not re.fullmatch(r"[!-~]*", found):  # a library would quote it in its own error
        raise SaigaError(f"HF_TOKEN contains characters that no token has, such as spaces; copy it from {_TOKENS}.")
    return found or None


def writing_token() -> str:
    if (found := token()) is None:
        raise SaigaError(
            "HF_TOKEN is not set. On Kaggle attach it to this notebook as a secret (Add-ons, Secrets); elsewhere set "
            f"the environment variable or run `hf auth login`. Create a token with write access at {_TOKENS}."
        )
    return found


def require_publishable() -> None:
    """Raise SaigaError if HF_REPO asks to publish what a notebook makes, and HF_TOKEN may not write there."""
    if (repo := workspace.secret(REPO)) is None:
        return
    with uploading(repo, "Asking the Hub about"):
        user = huggingface_hub.HfApi(token=writing_token()).whoami()
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if not is_hub_id(f"{repo}_lora") or repo.partition("/")[0].lower() not in map(str.lower, owners):
        raise SaigaError(f"{REPO}={repo!r}: give owner/name, where HF_TOKEN allows the owner {' or '.join(owners)}.")
    rights = user.get("auth", {}).get("accessToken", {})
    if rights.get("role") == "read" or "repo.write" not in str(rights.get("fineGrained", "repo.write")):
        raise SaigaError(_refusal(403, repo, ""))


@contextmanager
def uploading(repo_id: str, what: str = "The upload to") -> Iterator[None]:
    """Turn errors of an upload into SaigaErrors; hide progress bars, since Kaggle logs every line."""
    from huggingface_hub import errors, utils

    had_progress_bars = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    except errors.HfHubHTTPError as error:
        raise SaigaError(_refusal(error.response.status_code, repo_id, _reason(error))) from None
    # RuntimeError: the upload of one file failed.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # type: ignore[attr-defined]
        raise SaigaError(
            f"{what} {repo_id} was interrupted: {_reason(error)}. The repository changes only when all "
            "files have arrived. Try again; on Kaggle, switch Internet on."
        ) from None
    finally:
        if had_progress_bars:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _refusal(status: int, repo_id: str, reason: str) -> str:
    if status == 401:
        return f"The Hub rejects the token in HF_TOKEN: it is mistyped, expired or deleted. Create one at {_TOKENS}."
    if status == 403:
        return (
            f"The token in HF_TOKEN may not write to {repo_id}. Give it write access at {_TOKENS}, and name your own "
            "user or an organisation where you may write."
        )
    return f"The Hub refused {repo_id} ({status}): {reason}. If it is overloaded, try again later."


def _reason(error: BaseException) -> str:
    """The error and its cause on one line."""
    chain = [each for each in (error, error.__cause__) if each is not None]
    lines = [" ".join(masked(str(each)).split()) or type(each).__name__ for each in chain]
    return "; ".join(dict.fromkeys(lines))[:300].rstrip(".:; ")
