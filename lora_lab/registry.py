"""The tables METHODS and CONTROLLERS by id: our classes, those of installed packages, and registered ones.

A package adds classes by entry points in its pyproject.toml, under their ids:

    [project.entry-points."lora_lab.methods"]
    volume = "my_package.volume:Volume"

In Python `register` adds one for the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

from lora_lab.errors import ConfigError

Kind = TypeVar("Kind")
Class = TypeVar("Class", bound=type)


class Registry(Mapping[str, type[Kind]]):
    """Classes of one kind by id: ours first, in their order, then the others.

    Entry points are read once, when the table is first used, so that packages can import lora_lab.

    Args:
        what: "method", for messages.
        base: what every class inherits.
        needs: class attributes that every class must have.
        id_of: class → its id.
        own: our classes.
    """

    tables: ClassVar[list[Registry[Any]]] = []
    """All tables; each is in the package that has the base class."""

    def __init__(
        self,
        what: str,
        base: type[Kind],
        needs: tuple[str, ...],
        id_of: Callable[[Any], str],
        own: Iterable[type[Kind]],
    ):
        self.what, self.base, self.needs, self.id_of = what, base, needs, id_of
        self.group = f"lora_lab.{what}s"
        self.own: dict[str, type[Kind]] = {id_of(kind): kind for kind in own}
        """Only our classes, without reading entry points."""
        self._kinds = dict(self.own)
        self._complete = False
        self.tables.append(self)

    def __getitem__(self, name: str) -> type[Kind]:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def add(self, kind: type[Kind]) -> type[Kind]:
        """Adds a class under its id. The same class, defined again (in a notebook), replaces itself.

        Returns:
            The class, so that this serves as a decorator.

        Raises:
            ConfigError: if something is missing in the class, or the id is taken by another one.
        """
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise ConfigError(f"{kind!r}: a {self.what} must be a class that inherits {self.base.__name__}.")
        where = _path(kind)
        missing = [name for name in self.needs if not hasattr(kind, name)]
        if missing:
            raise ConfigError(
                f"{where}: a {self.what} needs the class attributes {', '.join(self.needs)}; missing: "
                f"{', '.join(missing)}. {self.base.__module__}.{self.base.__name__} says what they hold."
            )
        try:
            name = self.id_of(kind)
        except TypeError as error:
            raise ConfigError(
                f"{where}: its Spec must be a dataclass with a default for every field ({error})."
            ) from error
        if not (isinstance(name, str) and name.isidentifier()):
            raise ConfigError(f"{where}: the id of a {self.what} must be a plain name; got {name!r}.")
        other = self._all().get(name)
        if other is not None and _path(other) != where:
            raise ConfigError(
                f"{where}: the id '{name}' is taken by the {self.what} {_path(other)}. Choose another id, or "
                "uninstall one of the two packages."
            )
        self._kinds[name] = kind
        return kind

    def _all(self) -> dict[str, type[Kind]]:
        if not self._complete:
            self._complete = True  # what is loaded here may use the table itself
            try:
                for point in entry_points(group=self.group):
                    self._load(point)
            except ConfigError:
                self._complete = False
                raise
        return self._kinds

    def _load(self, point: EntryPoint) -> None:
        package = point.dist.name if point.dist else "an unknown package"
        where = f"entry point {self.group}: {point.name} = {point.value} of {package}"
        try:
            kind = point.load()
        except Exception as error:
            raise ConfigError(
                f"{where}: cannot be loaded ({type(error).__name__}: {error}). Update or uninstall {package}."
            ) from error
        self.add(kind)
        if self.id_of(kind) != point.name:
            raise ConfigError(f"{where}: its id is '{self.id_of(kind)}'; give the entry point this name.")


def register(kind: Class) -> Class:
    """Adds a method or a controller, for configs, the command line, storage and the contract tests.

    It is for this process only. A run in several processes, or `lora-lab train`, needs the entry point of an
    installed package.

    Args:
        kind: a class that inherits `Adapter` or `Controller`.

    Returns:
        The class, so that this serves as a decorator.

    Raises:
        ConfigError: if something is missing in the class, or its id is taken.
    """
    for table in Registry.tables:
        if isinstance(kind, type) and issubclass(kind, table.base):
            table.add(kind)
            return kind
    raise ConfigError(f"register: {kind!r} is not a class that inherits lora_lab.Adapter or Controller.")


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
