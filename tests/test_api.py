"""The public surface, written down: what changes it changes tests/api.txt, on purpose.

python tests/test_api.py writes that file anew.
"""

import enum
import inspect
from pathlib import Path

import supermix_transforms

INVENTORY = Path(__file__).with_name("api.txt")


class Shown(str):
    """A default as it is written in code."""

    __repr__ = str.__str__


def signature(value) -> str:
    """Names, kinds and defaults; annotations look different in each version of Python."""
    empty = inspect.Parameter.empty
    parameters = []
    for each in inspect.signature(value).parameters.values():
        default = each.default
        if isinstance(default, supermix_transforms.SolverSettings):
            default = Shown("SolverSettings()")
        elif default is not empty and callable(default):
            default = Shown(default.__name__)
        if each.name != "self":
            parameters.append(each.replace(annotation=empty, default=default))
    return str(inspect.Signature(parameters))


def lines_of(name: str, value) -> list[str]:
    """A function's line; or a class's, its public methods' and its properties'."""
    if not inspect.isclass(value):
        return [name + signature(value)]
    if issubclass(value, enum.Enum):
        return [f"{name}.{member.name} = {member.value}" for member in value]
    lines = [name + signature(value)]
    ours = [kind for kind in value.__mro__ if kind.__module__.startswith("supermix_transforms")]
    for attribute in sorted({attribute for kind in ours for attribute in vars(kind)}):
        member = inspect.getattr_static(value, attribute)
        if attribute.startswith("_"):
            continue
        if isinstance(member, property):
            lines.append(f"{name}.{attribute}")
        elif isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            lines.append(f"{name}.{attribute}{signature(getattr(value, attribute))}")
    return lines


def inventory() -> list[str]:
    names = sorted(supermix_transforms.__all__)
    return [line for name in names for line in lines_of(name, getattr(supermix_transforms, name))]


def test_the_public_surface_is_the_one_written_down():
    written = INVENTORY.read_text(encoding="utf-8").splitlines()
    assert len(written) > len(supermix_transforms.__all__)
    assert inventory() == written, "if the change is meant, run: python tests/test_api.py"


if __name__ == "__main__":
    INVENTORY.write_text("\n".join(inventory()) + "\n", encoding="utf-8")
