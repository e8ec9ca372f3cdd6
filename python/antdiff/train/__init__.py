"""The main job: train, compare and sample small diffusion models with clustered timesteps.

Everything here needs the ``train`` extra (``pip install "antdiff[train]"``) and nothing below imports it. `loop.py`
is the file to copy from when you write your own training loop.
"""
