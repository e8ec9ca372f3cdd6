"""Train diffusion models as multi-task learners: cluster the timesteps, take one gradient per cluster, balance them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from antdiff import analysis, balancing, companions, diffusion, distributed, ops, plotting
    from antdiff.clustering import StratifiedTimesteps, TimestepClusters, UniformTimesteps
    from antdiff.gradients import BalancedBackward, ClusterGradients, shared

__all__ = [
    "BalancedBackward",
    "ClusterGradients",
    "StratifiedTimesteps",
    "TimestepClusters",
    "UniformTimesteps",
    "analysis",
    "balancing",
    "companions",
    "diffusion",
    "distributed",
    "ops",
    "plotting",
    "shared",
]

_HOMES = {
    "BalancedBackward": "gradients",
    "ClusterGradients": "gradients",
    "StratifiedTimesteps": "clustering",
    "TimestepClusters": "clustering",
    "UniformTimesteps": "clustering",
    "shared": "gradients",
}


def _version() -> str:
    """Return the version of the installed package, or that of the source tree with "+source"."""
    import re
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version("antdiff")
    except PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        found = re.search(r'^version = "(.+)"$', project.read_text(), re.MULTILINE) if project.exists() else None
        return f"{found[1] if found else '0'}+source"


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return globals().setdefault(name, _version())
    # Import on first use: importing torch takes a second, and the command line prints its help and errors without it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"antdiff.{_HOMES.get(name, name)}")
    return globals().setdefault(name, getattr(home, name) if name in _HOMES else home)
