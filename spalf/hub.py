"""The Hugging Face hub: whether it can be reached, what it refuses, which commit a revision is."""

from __future__ import annotations

import logging
import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ANSWER_SECONDS = 8.0


@lru_cache(maxsize=1)
def hub_reachable() -> bool:
    """False if the hub's clients are told to stay offline, or its name does not resolve.

    They retry for the better part of a minute before they say so themselves. Behind a proxy the
    name need not resolve here, so there the answer is left to them.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    if getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def refusal(error: BaseException) -> str | None:
    """Why the hub did not hand something out, in words, where it was asked and answered.

    Args:
        error: what a client of the hub raised, perhaps because of another error.
    """
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: "it is gated: accept its terms on the hub, then `hf auth login`",
        errors.RepositoryNotFoundError: (
            "the hub has nothing of that name; if it is private, `hf auth login`"
        ),
        errors.RevisionNotFoundError: "the hub has no such revision of it",
    }
    raised: BaseException | None = error
    while raised is not None:
        for kind, reason in reasons.items():  # the first is one of the second
            if isinstance(raised, kind):
                return reason
        raised = raised.__cause__ or raised.__context__
    return None


def snapshot_of(repo: str, revision: str | None) -> str:
    """The directory in the hub's cache with the files of a model that was just fetched.

    Args:
        repo: hub id, or a local directory, which is its own.
        revision: the one that was fetched.

    Returns:
        The directory; ``repo`` itself where the cache does not know it.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(repo).is_dir():
        return repo
    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    return str(Path(found).parent) if isinstance(found, str) else repo


def commit_of(repo: str, revision: str | None, kind: Literal["model", "dataset"]) -> str | None:
    """The commit that a revision of a repository stands for now.

    Args:
        repo: hub id.
        revision: branch, tag or commit; ``None`` is the default branch.
        kind: of repository.

    Returns:
        A commit's hash: of the hub where it answers, else of its cache on this machine; ``None``
        where neither knows the repository.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    if hub_reachable():
        try:
            info = HfApi().repo_info(
                repo, revision=revision, repo_type=kind, timeout=_ANSWER_SECONDS
            )
            return info.sha
        except Exception as error:  # of several libraries; loading says what is wrong
            logger.debug("the hub does not tell the commit of %s: %s", repo, error)
    return _cached_commit(repo, revision, kind)


def _cached_commit(repo: str, revision: str | None, kind: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = "config.json" if kind == "model" else "README.md"
    try:
        found = try_to_load_from_cache(repo, name, revision=revision, repo_type=kind)
    except HFValidationError:
        return None
    # …/snapshots/<commit>/config.json
    return Path(found).parent.name if isinstance(found, str) else None
