"""What workers do: one file a kind of job, each a function from the job's request to its outcome."""

from .base import Report, Task
from .registry import TASKS, task_of

__all__ = ["TASKS", "Report", "Task", "task_of"]
