"""Print the lowest versions that pyproject.toml promises, as constraints for pip.

torch is left out: an old one brings gigabytes of CUDA libraries where the package index has no wheel for CPUs. The
caller chooses its version.
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["train"], *extras["test"]]:
    bound = re.fullmatch(r"([\w-]+)>=([\w.]+)(; .*)?", requirement)
    if bound and bound[1] != "torch":
        print(f"{bound[1]}=={bound[2]}{bound[3] or ''}")
