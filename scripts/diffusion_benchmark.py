"""ELFATT, token merging and Agent in diffusion models beside the unpatched model; see docs/diffusion.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from elfatt.analysis.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["diffusion", *sys.argv[1:]]))
