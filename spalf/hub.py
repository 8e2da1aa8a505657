"""Whether the Hugging Face hub can be reached, asked once before its clients start to retry."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies


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
