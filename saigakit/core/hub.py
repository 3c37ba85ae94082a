"""Fetch from the Hugging Face Hub, and explain in one sentence what it refuses."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from saigakit.core import workspace
from saigakit.errors import SaigaError

T = TypeVar("T")
_TOKENS = "https://huggingface.co/settings/tokens"
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
ATTACH_MODEL = (
    "Or attach a copy as a Kaggle model or data set and give its directory as base_source (for an adapter: as adapter)."
)
ATTACH_RECORDS = "No such path is here either: attach a copy as a Kaggle data set and give its name or a path in it."


def is_hub_id(name: str) -> bool:
    """Whether it is "owner/name" as the Hub has it, which no path of this machine is."""
    return _HUB_ID.fullmatch(name) is not None


def snapshot(repo: str, patterns: tuple[str, ...], repo_type: str = "model", revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    return asking(
        repo,
        lambda: Path(
            snapshot_download(
                repo,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=list(patterns),
                cache_dir=cache_dir(),
                token=workspace.secret("HF_TOKEN"),
            )
        ),
        ATTACH_RECORDS if repo_type == "dataset" else ATTACH_MODEL,
    )


def asking(repo: str, ask: Callable[[], T], attach: str = ATTACH_MODEL) -> T:
    # HTTPError is httpx's in huggingface_hub 1 and httpx2's in 2; no connection is one of these, and no OSError.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
    )

    try:
        return ask()
    except GatedRepoError:
        raise SaigaError(
            f"{repo} is gated: accept its licence on its Hub page and set the secret HF_TOKEN. {attach}"
        ) from None
    except RepositoryNotFoundError:
        raise SaigaError(f"{repo} is not on the Hub (any more), or HF_TOKEN may not see it. {attach}") from None
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".:") or type(error).__name__
        raise SaigaError(
            f"{repo} could not be fetched from the Hub: {reason}. On Kaggle, switch Internet on. {attach}"
        ) from None


def require_room(repo: str, repo_type: str, needed: int) -> None:
    from huggingface_hub.file_download import repo_folder_name

    blobs = cache_dir() / repo_folder_name(repo_id=repo, repo_type=repo_type) / "blobs"
    there = sum(blob.stat().st_size for blob in blobs.glob("*"))
    workspace.require_disk(cache_dir(), max(0, needed - there), f"Downloading {repo}")


def cache_dir() -> Path:
    return workspace.scratch_dir() / "hub"


def writing_token() -> str:
    token = (workspace.secret("HF_TOKEN") or "").strip()
    if not token:
        raise SaigaError(
            "HF_TOKEN is not set. On Kaggle attach it to this notebook as a secret (Add-ons, Secrets); elsewhere set "
            f"the environment variable. It is made at {_TOKENS} and must be allowed to write."
        )
    if not re.fullmatch(r"[!-~]+", token):  # a library would quote it in its own error
        raise SaigaError(f"HF_TOKEN holds characters that no token has, such as blanks: copy it again from {_TOKENS}.")
    return token


@contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars, of which Kaggle keeps every line."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def explained(repo_id: str, token: str) -> Iterator[None]:
    """The Hub's refusals and broken connections as sentences; the token is in none of them."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except HfHubHTTPError as error:
        raise SaigaError(_refusal(error.response.status_code, repo_id, _reason(error, token))) from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: of one file's upload
        raise SaigaError(
            f"The upload to {repo_id} was interrupted: {_reason(error, token)}. The repository changes only when all "
            "files have arrived. Try again; on Kaggle, switch Internet on."
        ) from None


def _refusal(status: int, repo_id: str, reason: str) -> str:
    if status == 401:
        return (
            f"The Hub does not know the token in HF_TOKEN: it is mistyped, expired or deleted. Make one at {_TOKENS}."
        )
    if status == 403:
        return (
            f"The token in HF_TOKEN may not write to {repo_id}. Give it write access at {_TOKENS}, and name your own "
            "user or an organisation where you may write."
        )
    return f"The Hub refused {repo_id} ({status}): {reason}. If it is overloaded, try again later."


def _reason(error: BaseException, token: str) -> str:
    """One line of it and of what caused it."""
    chain = [error, error.__cause__] if error.__cause__ is not None else [error]
    texts = dict.fromkeys(" ".join(str(each).split()) or type(each).__name__ for each in chain)
    return "; ".join(texts).replace(token, "…")[:300].rstrip(".:; ")
