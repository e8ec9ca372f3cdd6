"""Route ``grouped``: one forward and one backward that yield K weight gradients."""
