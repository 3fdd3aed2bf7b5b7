"""What the settings of all caches have in common: names, merging, and those of a second transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.targets import Target
from sgl_diffusion_accel.validate import FrozenSettings, check_names, of_type

_Self = TypeVar("_Self", bound="CacheConfig")

SECOND = "transformer_2"
"""The component that `secondary` is for."""


class CacheConfig:
    """Settings of a cache: a frozen dataclass, checked when it is made and never changed.

    Attributes:
        main: The setting that may be given alone in the place of a config; empty for none.
        function: The function that takes the config, with an example of its use, for errors.
        only_first: Settings that `secondary` cannot have, to why.
    """

    main: ClassVar[str] = ""
    function: ClassVar[tuple[str, str]]
    only_first: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all settings."""
        return tuple(each.name for each in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def of(cls: type[_Self], given: object, named: Mapping[str, Any]) -> _Self:
        """Makes the config that a call asks for.

        Args:
            given: A config, the main setting alone, or None.
            named: Single settings by name, which go over it.

        Raises:
            ConfigError: A setting is unknown, not allowed, or given twice.
            ConfigTypeError: `given` is something else.
        """
        name, example = cls.function
        check_names("setting", list(named), cls.names(), name)
        if isinstance(given, cls):
            return given.changed(**named)
        if given is None:
            return cls(**named)
        if cls.main and not isinstance(given, CacheConfig):
            if cls.main in named:
                raise ConfigError(f"{cls.main} is given twice, by its place and by its name. Give it once.")
            return cls(**{cls.main: given, **named})
        allowed = f"a {cls.__name__}. Single settings go by name: {example}"
        return of_type("the second argument", given, cls, allowed)  # type: ignore[no-any-return]

    def changed(self: _Self, **settings: Any) -> _Self:
        """The same with other values of some settings."""
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]

    def _checked_secondary(self, secondary: Any) -> FrozenSettings | None:
        """The settings of a second transformer, by known names; their values are checked with `for_component`."""
        if secondary is None:
            return None
        of_type("secondary", secondary, Mapping, "a dict of settings, or None")
        for name in secondary:
            if self.only_first.get(name):
                raise ConfigError(f"secondary cannot have {name}: {self.only_first[name]}")
        allowed = [name for name in self.names() if name != "secondary" and name not in self.only_first]
        check_names("setting", list(secondary), allowed, "secondary")
        return FrozenSettings(secondary)

    def for_component(self: _Self, name: str) -> _Self:
        """Returns the settings for one transformer of a pipeline: `secondary` applies to `"transformer_2"`."""
        secondary: Mapping[str, Any] | None = getattr(self, "secondary", None)
        return self.changed(**{**(secondary or {} if name == SECOND else {}), "secondary": None})

    def check_targets(self, pipe: object, targets: tuple[Target, ...]) -> None:
        """Raises ConfigError where there are settings for a transformer that a pipeline does not have."""
        secondary: Mapping[str, Any] | None = getattr(self, "secondary", None)
        if secondary and SECOND not in [target.name for target in targets]:
            raise ConfigError(
                f"secondary={dict(secondary)!r} is for {SECOND}, and {type(pipe).__name__} has none. "
                "Leave secondary out."
            )
