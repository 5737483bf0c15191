"""What the experiments share. Importing it makes the modules of the program importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
