"""``python -m convolt.scaling JOB.json ANSWER.json``: one rank of a job; see worker.py."""

import sys
from pathlib import Path

from convolt.scaling.worker import main

sys.exit(main(*map(Path, sys.argv[1:])))
