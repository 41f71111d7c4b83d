"""One of two processes of a run, each with two devices."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

from training_cases import settings

import nyscaled as nys
from nyscaled.finetune import loop, progress

address, index, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
options = {"steps": 6, "eval_every": 3, "log_every": 2, "micro_batch_size": 4}
config = settings(
    root, out=root / "two", processes=f"{address},2,{index}", mesh="fsdp=2", **options
)
write = progress.Progress.steps


def pressing(self, lines):
    """Ctrl-C in the second process."""
    write(self, lines)
    if index == 1 and lines[-1]["step"] == 2:
        signal.raise_signal(signal.SIGINT)


progress.Progress.steps = pressing
try:
    nys.finetune.run(config)
    stopped = ""
except loop.Stopped as error:
    stopped = str(error)
progress.Progress.steps = write
result = nys.finetune.run(dataclasses.replace(config, resume=True))
again = nys.finetune.run(dataclasses.replace(config, resume=True))
print(json.dumps({"stopped": stopped, "loss": result.validation_loss, "same": again == result}))
