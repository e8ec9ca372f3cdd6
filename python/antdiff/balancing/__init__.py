"""Balancing methods: from the K losses, or the Gram matrix of their K gradients, to K weights.

One file a method. A new one is its file and its name in ``_METHODS``; :func:`get`, the command line and the property
tests find it there.
"""

from __future__ import annotations

from typing import Any

from antdiff.balancing.base import Balancer, GramBalancer
from antdiff.balancing.linear import Linear
from antdiff.balancing.nash import NashMTL
from antdiff.balancing.pcgrad import PCGrad
from antdiff.balancing.uncertainty import UncertaintyWeighting

__all__ = ["Balancer", "GramBalancer", "Linear", "NashMTL", "PCGrad", "UncertaintyWeighting", "get", "names"]

_METHODS: dict[str, Any] = {method.name: method for method in (PCGrad, NashMTL, UncertaintyWeighting, Linear)}


def names() -> list[str]:
    """Names of all methods."""
    return list(_METHODS)


def get(name: str) -> Any:
    """The class of a method, to be called with its options.

    Methods with ``needs == "gram"`` take keyword options alone, ``get("nash")(max_norm=1.0)``; those with
    ``needs == "losses"`` take the number of clusters first, ``get("uw")(k)``.

    Raises:
        ValueError: there is no such method.
    """
    if name not in _METHODS:
        raise ValueError(f"name must be one of {', '.join(_METHODS)}; got {name!r}.")
    return _METHODS[name]
