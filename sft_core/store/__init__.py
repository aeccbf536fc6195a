"""The store: outputs that are addressed by what went into them, whole or absent, and verifiable.

Modules inside the project import from the module that defines a name. The names here are for scripts and notebooks.
"""

from sft_core.store.manifest import CorruptOutput
from sft_core.store.ref import Ref
from sft_core.store.stage import Build, Located, Needs, Part, Stage, Unresolved, part_name
from sft_core.store.store import Store, is_url

__all__ = [
    "Build",
    "CorruptOutput",
    "Located",
    "Needs",
    "Part",
    "Ref",
    "Stage",
    "Store",
    "Unresolved",
    "is_url",
    "part_name",
]
