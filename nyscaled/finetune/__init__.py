"""Fine-tuning: data and templates, scorers, the training loop and evaluation."""

from nyscaled.finetune import dreambooth
from nyscaled.finetune.config import Config
from nyscaled.finetune.encoding import Lengths, encode, encode_sentences
from nyscaled.finetune.evaluation import Evaluation, Prediction, Score, evaluate
from nyscaled.finetune.examples import Encoded, Example, few_shot, overlap
from nyscaled.finetune.launch import Result, run
from nyscaled.finetune.merging import Exported, export
from nyscaled.finetune.methods import METHODS, Method, method
from nyscaled.finetune.records import Row, find_splits, read_rows, read_split
from nyscaled.finetune.sweeping import Run, Sweep, sweep
from nyscaled.finetune.task import Task, Template
from nyscaled.finetune.tasks import TASKS

__all__ = [
    "METHODS",
    "TASKS",
    "Config",
    "Encoded",
    "Evaluation",
    "Example",
    "Exported",
    "Lengths",
    "Method",
    "Prediction",
    "Result",
    "Row",
    "Run",
    "Score",
    "Sweep",
    "Task",
    "Template",
    "dreambooth",
    "encode",
    "encode_sentences",
    "evaluate",
    "export",
    "few_shot",
    "find_splits",
    "method",
    "overlap",
    "read_rows",
    "read_split",
    "run",
    "sweep",
]
