"""The main job: train small diffusion models with clustered timesteps.

Everything here needs the ``train`` extra (``pip install "antdiff[train]"``), and no lower layer imports it. To write
your own training loop, copy from `loop.py`.
"""
