"""Settings of `apply_lossless`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sgl_diffusion_accel.validate import choice, flag

VerifyWhen = Literal["first"]


@dataclass(frozen=True)
class LosslessConfig:
    """What was asked of `apply_lossless`, by the names of its arguments.

    Attributes:
        padding: Whether padding is cut, and masks that hide nothing are left out.
        constants: Whether what has one result is computed once, and what is multiplied by 0 not at all.
        verify: `"first"` makes the first call of each branch and shape both ways; None makes none.

    Raises:
        ConfigError: A value is not allowed.
        ConfigTypeError: A value has the wrong type.
    """

    padding: bool = True
    constants: bool = True
    verify: VerifyWhen | None = None

    def __post_init__(self) -> None:
        flag("padding", self.padding)
        flag("constants", self.constants)
        if self.verify is not None:
            choice("value of verify", self.verify, ("first",))
