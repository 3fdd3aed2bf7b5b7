"""Settings of `set_attention_backend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgl_diffusion_accel.attention.redirect import OnUnsupported
from sgl_diffusion_accel.validate import choice, count, flag


@dataclass(frozen=True)
class AttentionConfig:
    """What was asked of `set_attention_backend`, by the names of its arguments.

    Raises:
        ConfigError: A value is not allowed.
        ConfigTypeError: A value has the wrong type.
    """

    backend: str | Mapping[str, str]
    components: str | Sequence[str] | None = None
    layers: str | Sequence[str] | None = None
    skip_first_steps: int = 0
    skip_last_steps: int = 0
    on_unsupported: OnUnsupported = "error"
    verify: bool | None = None
    allow_quantised: bool = False

    def __post_init__(self) -> None:
        choice("value of on_unsupported", self.on_unsupported, ("error", "native"))
        for name in ("skip_first_steps", "skip_last_steps"):
            object.__setattr__(self, name, count(name, getattr(self, name), 0))
        flag("verify", self.verify, or_none=True)
        flag("allow_quantised", self.allow_quantised)
