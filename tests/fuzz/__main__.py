"""Changes files for a while, and ends with 1 if some reading went wrong.

make fuzz                            # two minutes
make fuzz SECONDS=3600 SEED=new      # longer, other changes
python tests/fuzz 60 seed gguf config
"""

import sys

from fuzz_campaign import run
from fuzz_targets import TARGETS

if __name__ == "__main__":
    seconds, seed, *targets = [*sys.argv[1:], *("120", "0")[len(sys.argv) - 1 :]]
    sys.exit(bool(run(float(seconds), seed, targets or list(TARGETS))))
