"""What the settings of all caches have in common: names, merging, and those of a second transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from sgl_diffusion_accel.errors import ConfigError
from sgl_diffusion_accel.targets import Targets
from sgl_diffusion_accel.validate import FrozenSettings, check_names, of_type

_Self = TypeVar("_Self", bound="CacheConfig")

SECOND = "transformer_2"
"""The component that `secondary` is for."""


class CacheConfig:
    """Settings of a cache: a frozen dataclass, checked when it is made and never changed.

    Attributes:
        main: The setting that may be given alone in the place of a config; empty for none.
        function: The function that takes the config, with an example of its use, for errors.
        aliases: Names of the peers, and short ones, to the names here: they do as well in a call and in `secondary`.
        only_first: Settings that `secondary` cannot have, to why.
    """

    main: ClassVar[str] = ""
    function: ClassVar[tuple[str, str]]
    aliases: ClassVar[Mapping[str, str]] = {}
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
        named = cls._by_own_names(named, name)
        if isinstance(given, cls):
            return given.changed(**named)
        if given is None:
            return cls(**named)
        if cls.main and not isinstance(given, CacheConfig):
            if cls.main in named:
                raise ConfigError(f"{cls.main} is given twice, by its place and by its name. Give it once.")
            return cls(**{cls.main: given, **named})
        article = "an" if cls.__name__[0] in "AEIO" else "a"
        allowed = f"{article} {cls.__name__}. Single settings go by name: {example}"
        return of_type("the second argument", given, cls, allowed)  # type: ignore[no-any-return]

    @classmethod
    def _by_own_names(cls, named: Mapping[str, Any], where: str) -> dict[str, Any]:
        check_names("setting", list(named), [*cls.names(), *cls.aliases], where)
        found: dict[str, tuple[str, Any]] = {}
        for name, value in named.items():
            own = cls.aliases.get(name, name)
            if own in found:
                raise ConfigError(f"{own} is given twice, as {found[own][0]} and as {name}. Give it once.")
            found[own] = (name, value)
        return {own: value for own, (_, value) in found.items()}

    def changed(self: _Self, **settings: Any) -> _Self:
        """The same with other values of some settings."""
        return dataclasses.replace(self, **settings)  # type: ignore[type-var]

    def _checked_secondary(self, secondary: Any) -> FrozenSettings | None:
        """The settings of a second transformer, by known names; their values are checked with `for_component`."""
        if secondary is None:
            return None
        of_type("secondary", secondary, Mapping, "a dict of settings, or None")
        for name in secondary:
            why = self.only_first.get(self.aliases.get(name, name))
            if why:
                raise ConfigError(f"secondary cannot have {name}: {why}")
        allowed = [name for name in self.names() if name != "secondary" and name not in self.only_first]
        known = [*allowed, *(alias for alias, name in self.aliases.items() if name in allowed)]
        check_names("setting", list(secondary), known, "secondary")
        return FrozenSettings(self._by_own_names(secondary, "secondary"))

    def for_component(self: _Self, name: str) -> _Self:
        """Returns the settings for one transformer of a pipeline: `secondary` applies to `"transformer_2"`."""
        secondary: Mapping[str, Any] | None = getattr(self, "secondary", None)
        return self.changed(**{**(secondary or {} if name == SECOND else {}), "secondary": None})

    def check_targets(self, targets: Targets) -> None:
        """Raises ConfigError where there are settings for a transformer that a pipeline does not have."""
        secondary: Mapping[str, Any] | None = getattr(self, "secondary", None)
        if secondary and SECOND not in targets.names:
            raise ConfigError(
                f"secondary={dict(secondary)!r} is for {SECOND}, and {targets.pipeline} has none. Leave secondary out."
            )
