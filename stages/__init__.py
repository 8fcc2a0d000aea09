"""One thin script a stage. This checkout's sources come first, so that an experiment in a
temporary directory runs the code that was committed with it, not an editable install elsewhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
