"""Route ``grouped``: one forward and one backward, K weight gradients."""
