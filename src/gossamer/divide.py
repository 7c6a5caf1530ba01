"""The division of a method's weights into groups."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from gossamer.checks import closest
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups, layout_of
from gossamer.masks import MaskedTensor
from gossamer.structure import ISS, ByName, Division, Structure
from gossamer.targets import Target, matches
from gossamer.units import units


def divide(targets: Sequence[Target], structure: Structure) -> list[Groups]:
    """Put weights under full masks, and divide them into groups.

    Raises:
        ConfigurationError: A weight that cannot be divided so.
    """
    if isinstance(structure, ByName):
        return _by_name(targets, structure)
    if isinstance(structure, ISS):
        return [*units(targets, structure)]
    parts = [part for part in structure.parts() if isinstance(part, Division)]
    found = []
    for target in targets:
        layout = layout_of(target)
        for part in parts:
            part.validate(target.name, layout)
        if len(parts) > 1 and layout.convolution_groups > 1:
            raise ConfigurationError(
                f"{target.name}: {structure} needs every output to see every input, but the convolution has "
                f"{layout.convolution_groups} groups; exclude it with targets=['!{target.name}']"
            )
        tensor = MaskedTensor(target, str(structure), lcm(*(part.row_multiple(layout) for part in parts)))
        found += [Groups(tensor, part) for part in parts]
    return found


def _by_name(targets: Sequence[Target], structure: ByName) -> list[Groups]:
    globs = structure.structures
    used: set[str] = set()
    parts: list[tuple[Structure, list[Target]]] = []
    for target in targets:
        glob = next((glob for glob in globs if matches(target.name, glob)), None)
        if glob is None:
            raise ConfigurationError(
                f"structure: no glob of {list(globs)} gives {target.name} a structure; add one ('*' matches the rest)"
            )
        used.add(glob)
        alike = next((found for each, found in parts if each == globs[glob]), None)
        if alike is None:
            parts.append((globs[glob], [target]))
        else:  # hidden units run over several weights
            alike.append(target)
    if unused := next((glob for glob in globs if glob not in used), None):
        raise ConfigurationError(
            f"structure: {unused!r} matches none of the targets (or an earlier glob takes them all)"
            + closest(unused, [target.name for target in targets])
        )
    found = [groups for each, chosen in parts for groups in divide(chosen, each)]
    order = {target.name: place for place, target in enumerate(targets)}
    return sorted(found, key=lambda groups: order[groups.name])
