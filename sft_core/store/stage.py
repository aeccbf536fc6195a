"""Stage: one kind of output, how it is built and what its identity is made of; Build and Located go with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from sft_core.store.code_digest import code_digest
from sft_core.store.made_by import MadeBy, made_by
from sft_core.store.manifest import Identity, Manifest
from sft_core.store.ref import Ref

if TYPE_CHECKING:
    from sft_core.recipe.recipe import Recipe
    from sft_core.recipe.sections import Runtime

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Section: TypeAlias = Mapping[str, Json]  # what an identity holds of a recipe: the builder's keyword arguments
Part = dict[str, Any]
Needs = dict[str, tuple["Stage[Any]", Part]]  # by the name under which the builder finds the output


class Subject(Protocol):
    """What outputs are made from, such as a recipe with its pins.

    The store reads `recipe.runtime` and passes the subject to the functions of a stage.
    """

    @property
    def recipe(self) -> Recipe: ...


S = TypeVar("S", bound=Subject)


class Unresolved(ValueError):
    """A name cannot be resolved now: outputs that are made from it have no key yet."""


@dataclasses.dataclass(frozen=True)
class Build:
    """What a builder gets besides its section of the recipe."""

    out: Path  # an empty folder, or the folder of the last attempt when the stage is resumable
    inputs: Mapping[str, Path]  # folders of the outputs that the builder reads
    runtime: Runtime
    upload: Callable[[Path], None] | None = None  # None for a store that is a folder
    manifests: Mapping[str, Manifest] = dataclasses.field(default_factory=dict)  # of all inputs

    def keep(self, folder: Path) -> None:
        """Keeps a finished folder below `out`, such as a checkpoint, so that it outlives this machine.

        A store behind a URL uploads the folder; a store that is a folder does nothing. The names of folders end with a
        number, as checkpoint-60 does, and the highest is the newest. A build whose `out` has no whole folder as new as
        the newest kept one gets the kept folders back, under the same names, without the damaged ones. All of them are
        removed once the output is whole.

        The folder holds the digests.json that `write_digests` (sft_core/store/digests.py) writes; it is uploaded last.
        Kept folders that are no longer below `out` are removed, so the URL never keeps more of them than `out`; a
        folder that is removed during its upload is not kept. Call it in the process that builds, one folder at a time;
        a second thread of that process may call it. Raises OSError when the store cannot be reached.
        """
        if self.upload is not None:
            self.upload(folder)


@dataclasses.dataclass(frozen=True)
class Stage(Generic[S]):
    """One kind of output.

    build: writes the output, and returns counts for the manifest: JSON, shown on cards.
    section: the builder's keyword arguments from the recipe. They are part of the identity.
    loaders: how to load what the section names only by digest, as paths. The builder gets them in place of the
    section's values of the same names; they are not part of the identity.
    needs: the outputs that the builder reads. A part says which output of a stage: {"source": "chat"}, {"round": 2}.
    reads: patterns of the files that the builder reads, by the stage of an input; it reads all files of other stages.
    The store verifies those files before the build.
    reads_manifest_of: the outputs of which the builder reads only the manifest, so their files are not downloaded.
    modules: modules that the builder reaches through an object among `loaders`, or that it starts as processes. Its
    imports do not show them, but their code counts as the builder's.
    version: replaces the digest of the builder's code, where a rename must not cost days of training. The manifest then
    says by which code and libraries the output was made.
    libraries: packages whose versions count.
    temporary: patterns of names in `out` of what a resumable build needs to go on, and the output does not have. It is
    removed once the output is whole.
    """

    name: str
    build: Callable[..., dict[str, Any]]
    section: Callable[[S, Part], Section]
    loaders: Callable[[S, Part], Mapping[str, object]] = lambda subject, part: {}
    needs: Callable[[S, Part], Needs] = lambda subject, part: {}
    reads: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    reads_manifest_of: Callable[[S, Part], Needs] = lambda subject, part: {}
    modules: Callable[[S, Part], tuple[str, ...]] = lambda subject, part: ()
    version: int | None = None
    libraries: tuple[str, ...] = ()
    resumable: bool = False
    temporary: tuple[str, ...] = ()

    def code(self, modules: tuple[str, ...]) -> str | int:
        """The builder's code in an identity: the version, or a digest, which takes milliseconds.

        modules: the result of `self.modules` for the part.
        """
        if self.version is not None:
            return self.version
        return code_digest(self.build.__module__, self.libraries, others=modules)

    def made_by(self, modules: tuple[str, ...]) -> MadeBy | None:
        """The builder's code and libraries where the identity has a version; None where it has them itself.

        modules: the result of `self.modules` for the part.
        """
        return None if self.version is None else made_by(modules or (self.build.__module__,), self.libraries)

    def inputs(self, subject: S, part: Part) -> Needs:
        """All outputs that must be there before it is built; their contents are part of the identity."""
        return {**self.needs(subject, part), **self.reads_manifest_of(subject, part)}


@dataclasses.dataclass(frozen=True)
class Located:
    """Where an output is or would be.

    status: `hit`, it is there; `build`, it is not; `depends`, its key depends on an input that is not built yet or on a
    name that could not be resolved, so `ref` is None.
    """

    stage: Stage[Any]
    part: Part
    status: Literal["hit", "build", "depends"]
    ref: Ref | None
    identity: Identity

    @property
    def name(self) -> str:
        return part_name(self.part)


def part_name(part: Part) -> str:
    """The values of a part, joined by commas; for the rows of a roll-out, each source and its number of rows."""
    return ",".join(map(_shown, part.values())) or "-"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(name if amount is None else f"{name}:{amount}" for name, amount in value.items())
    return str(value)
