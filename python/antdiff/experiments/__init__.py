"""Experiments on runs: measure, sample, compare, analyze, report."""
