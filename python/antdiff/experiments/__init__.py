"""What is done with runs: measure, sample, compare, analyze, report."""
