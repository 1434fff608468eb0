"""Import this first: it finds prism_cuda in the checkout where none is installed.

The checkout comes last on the path, so that an installed package is not shadowed by its sources.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
