"""Kernels of a hub, through Hugging Face's package `kernels`; none is fetched unless its backend is set by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class HubKernel:
    """A kernel of a hub.

    Attributes:
        repository: Such as `"kernels-community/flash-attn2"`.
        version: Its version there, a branch such as `v3`.
        function: Name of the attention function in its module.
    """

    repository: str
    version: int
    function: str

    def load(self) -> Callable[..., Any]:
        """Loads its function, and fetches the kernel for this machine if it is not here.

        `kernels` refuses publishers that the hub does not list as trusted, unless the environment variable
        DIFFUSERS_TRUST_REMOTE_KERNELS is true, as with diffusers.
        """
        from kernels import get_kernel  # type: ignore[import-not-found, unused-ignore]

        trusts = os.environ.get("DIFFUSERS_TRUST_REMOTE_KERNELS", "").upper() in _TRUE
        try:
            module = get_kernel(self.repository, version=self.version, trust_remote_code=trusts)
        except ValueError as error:
            if "trust" not in str(error):
                raise
            raise ValueError(
                f"{error} Here: set the environment variable DIFFUSERS_TRUST_REMOTE_KERNELS=true if you trust "
                f"{self.repository}."
            ) from error
        function: Callable[..., Any] = getattr(module, self.function)
        return function

    def would_fetch(self) -> str | None:
        """That it would be fetched, and from where; None if it is in the local cache of `kernels`."""
        if self._is_local() or any(self._is_cached(kind) for kind in ("kernel", "model")):
            return None
        return f"it would be downloaded from {self.repository} (version {self.version}) when set"

    def _is_local(self) -> bool:
        """Whether a folder is named for it by the variable of `kernels` for that."""
        entries = os.environ.get("LOCAL_KERNELS", "").split(":")
        return any(entry.partition("=")[0] == self.repository for entry in entries)

    def _is_cached(self, kind: str) -> bool:
        """Whether the version and files of it are in the cache; newer `kernels` have a folder of their own."""
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
        folder = cache / f"{kind}s--{self.repository.replace('/', '--')}"
        try:
            commit = (folder / "refs" / f"v{self.version}").read_text().strip()
            return any((folder / "snapshots" / commit / "build").iterdir())
        except OSError:
            return False
