"""One thin script a stage. This checkout's sources come first, so that an experiment in a
temporary directory runs the code that was committed with it, not an editable install elsewhere."""

import os
import sys
from pathlib import Path

# Worker processes keep memory that they free: half of the codec's time went into page faults.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
