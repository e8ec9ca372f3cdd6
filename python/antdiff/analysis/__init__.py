"""What the gradients and losses of a model's clusters say: while it trains, and afterwards."""

from antdiff.analysis.telemetry import Telemetry

__all__ = ["Telemetry"]
