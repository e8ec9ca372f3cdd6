"""Balancing methods: they turn K losses, or the Gram matrix of K gradients, into K weights that are ready to use.

There is one file per method. To add a method, write its file and add a line to ``_METHODS``; :func:`get`, the command
line, the table of the documentation and the property tests read that table.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antdiff.balancing.aligned_mtl import AlignedMTL
    from antdiff.balancing.base import About, Balancer, DirectionBalancer, GramBalancer, LossBalancer
    from antdiff.balancing.cagrad import CAGrad
    from antdiff.balancing.config import ConFIG
    from antdiff.balancing.dualproj import DualProj
    from antdiff.balancing.dwa import DynamicWeightAverage
    from antdiff.balancing.fairgrad import FairGrad
    from antdiff.balancing.famo import FAMO
    from antdiff.balancing.gls import GeometricLoss
    from antdiff.balancing.graddrop import GradDrop
    from antdiff.balancing.gradvac import GradVac
    from antdiff.balancing.imtl_g import IMTLG
    from antdiff.balancing.imtl_l import IMTLL
    from antdiff.balancing.linear import Linear
    from antdiff.balancing.mgda import MGDA
    from antdiff.balancing.nash import NashMTL
    from antdiff.balancing.pcgrad import PCGrad
    from antdiff.balancing.rlw import RandomLossWeighting
    from antdiff.balancing.stch import SmoothTchebycheff
    from antdiff.balancing.uncertainty import UncertaintyWeighting
    from antdiff.balancing.upgrad import UPGrad

__all__ = [
    "FAMO",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "About",
    "AlignedMTL",
    "Balancer",
    "CAGrad",
    "ConFIG",
    "DirectionBalancer",
    "DualProj",
    "DynamicWeightAverage",
    "FairGrad",
    "GeometricLoss",
    "GradDrop",
    "GradVac",
    "GramBalancer",
    "Linear",
    "LossBalancer",
    "NashMTL",
    "PCGrad",
    "RandomLossWeighting",
    "SmoothTchebycheff",
    "UPGrad",
    "UncertaintyWeighting",
    "get",
    "names",
    "published",
]

# The file and the class of each method. A file, and torch with it, is imported only when its class is requested,
# because the help of the command line needs only the names.
_METHODS = {
    # from the Gram matrix
    "pcgrad": "pcgrad.PCGrad",
    "nash": "nash.NashMTL",
    "upgrad": "upgrad.UPGrad",
    "aligned_mtl": "aligned_mtl.AlignedMTL",
    "mgda": "mgda.MGDA",
    "cagrad": "cagrad.CAGrad",
    "imtl_g": "imtl_g.IMTLG",
    "config": "config.ConFIG",
    "dualproj": "dualproj.DualProj",
    "gradvac": "gradvac.GradVac",
    "fairgrad": "fairgrad.FairGrad",
    # from the gradients
    "graddrop": "graddrop.GradDrop",
    # from the losses
    "uw": "uncertainty.UncertaintyWeighting",
    "linear": "linear.Linear",
    "rlw": "rlw.RandomLossWeighting",
    "dwa": "dwa.DynamicWeightAverage",
    "gls": "gls.GeometricLoss",
    "imtl_l": "imtl_l.IMTLL",
    "famo": "famo.FAMO",
    "stch": "stch.SmoothTchebycheff",
}
_BASES = ("base.About", "base.Balancer", "base.DirectionBalancer", "base.GramBalancer", "base.LossBalancer")
_HOMES = {home.partition(".")[2]: home for home in (*_METHODS.values(), *_BASES)}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file, _, attribute = _HOMES[name].partition(".")
    return globals().setdefault(name, getattr(import_module(f"{__name__}.{file}"), attribute))


def names() -> list[str]:
    """Return the names of all methods."""
    return list(_METHODS)


def get(name: str) -> Any:
    """Return the class of a method, to be called with its options.

    Methods with ``needs == "gram"`` or ``needs == "rows"`` take keyword options only, ``get("nash")(max_norm=1.0)``.
    Methods with ``needs == "losses"`` take the number of clusters first, ``get("uw")(k)``.

    Raises:
        ValueError: no method has this name.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"name must be one of {', '.join(_METHODS)}; got {str(name)[:80]!r}.")
    return __getattr__(_METHODS[name].partition(".")[2])


def published(name: str) -> dict[str, Any]:
    """Return the options with which the published results of a method were obtained, where they are not the defaults.

    Use them as ``get("nash")(**published("nash"))``. ``get(name).about.published`` describes the other differences.
    """
    return dict(get(name).about.options)
