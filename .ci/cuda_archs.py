"""Print the GPU architectures of the machine code in a binary, and the number of kernel objects per architecture.

This script reads the fat-binary containers directly (magic 0xba55ed50, then entries that state their kind and their
architecture). It needs neither a GPU nor cuobjdump, and the payload may be compressed.
"""

import struct
import sys
from collections import Counter
from pathlib import Path

HEADER = struct.Struct("<IHHQ")  # magic, version, header size, size of the entries
ENTRY = struct.Struct("<HHIQ12xI")  # kind (1 PTX, 2 code), version, header size, payload size, ..., architecture
MAGIC = struct.pack("<IH", 0xBA55ED50, 1)


def architectures(binary: bytes) -> Counter[str]:
    """Count the kernel objects in a binary per architecture."""
    found: Counter[str] = Counter()
    at = binary.find(MAGIC)
    while at >= 0:
        _, _, header, size = HEADER.unpack_from(binary, at)
        entry, end = at + header, at + header + size
        while entry + ENTRY.size <= end:
            kind, _, entry_header, payload, arch = ENTRY.unpack_from(binary, entry)
            found[f"{'sm' if kind == 2 else 'compute'}_{arch}"] += 1
            entry += entry_header + payload
        at = binary.find(MAGIC, end)
    return found


if __name__ == "__main__":
    binary, *wanted = sys.argv[1:]
    counts = architectures(Path(binary).read_bytes())
    print(binary, dict(counts))
    missing = [arch for arch in wanted if not counts[arch]]
    sys.exit(f"no kernels for {missing}" if missing else 0)
