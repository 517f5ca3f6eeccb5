"""What a network is trained for: head, losses and outputs, a file a task; TASKS is the table of them all.

Importing this registers classify, embed, multilabel, binary, detect, segment, semantic and pose.
See TrainingTask for one of your own.
"""

from leanvit.tasks.classify import CLASSIFY
from leanvit.tasks.detect import DETECT, SEGMENT
from leanvit.tasks.embed import EMBED
from leanvit.tasks.labels import BINARY, MULTILABEL
from leanvit.tasks.pose import POSE
from leanvit.tasks.semantic import SEMANTIC
from leanvit.tasks.task import TASKS, TrainingTask, register, task_named

__all__ = [
    "BINARY", "CLASSIFY", "DETECT", "EMBED", "MULTILABEL", "POSE", "SEGMENT", "SEMANTIC", "TASKS", "TrainingTask",
    "register", "task_named",
]  # fmt: skip
