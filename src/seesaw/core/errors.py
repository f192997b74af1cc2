"""The exception tree.

SeesawError
├── ConfigError (also ValueError)     an argument, plan or model that cannot be used; nothing has started
│   ├── LayoutError                   a layout or plan that does not parse or does not fit the model
│   ├── ModelError                    an unreadable, unsupported or incomplete checkpoint
│   └── MemoryBudgetError             a plan that does not fit the memory budgets; the message shows the arithmetic
├── RequestError (also ValueError)    one request that cannot be served; carries a machine-readable `code`
├── EngineError                       the engine failed while running
│   ├── WorkerError                   a worker raised, died or hangs; carries `rank`, `phase` and who is `lost`
│   └── StartupError                  workers did not become ready in time
└── JobError                          a job file that cannot be read or written
    └── JobFilesError                 files of an earlier job that do not fit what is asked for
"""

from __future__ import annotations


class SeesawError(Exception):
    """Base of every error Seesaw raises on purpose."""


class ConfigError(SeesawError, ValueError):
    """An argument that cannot be used. Raised before any worker starts."""


class LayoutError(ConfigError):
    """A layout or plan that does not parse, or that does not fit the model or the number of ranks."""


class ModelError(ConfigError):
    """A checkpoint or `config.json` that is missing, unreadable or not supported."""


class MemoryBudgetError(ConfigError):
    """A plan that does not fit `device_memory` or `host_kv`; the message shows the arithmetic."""


class RequestError(SeesawError, ValueError):
    """One request that cannot be served. Other requests go on.

    `code` is a stable machine-readable reason such as `prompt_too_long`; `param` names the offending field.
    """

    def __init__(self, message: str, *, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class EngineError(SeesawError, RuntimeError):
    """The engine failed while running."""


class WorkerError(EngineError):
    """A worker raised, died or hangs.

    `rank` is the worker's rank and `phase` what it was doing (`startup`, `prefill`, `decode`, `transition`, …).
    `details` holds the worker's traceback, if it had one; the message alone is meant for users. `lost` are the
    ranks that have to be done without: they died, hang, or their device failed. It is empty where a rank raised
    an error that would come again on any other.
    """

    def __init__(
        self, message: str, *, rank: int, phase: str, details: str = "", lost: tuple[int, ...] = ()
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase
        self.details = details
        self.lost = lost


class StartupError(EngineError):
    """Workers did not report ready within the time allowed."""


class JobError(SeesawError):
    """A job file that cannot be read or written."""


class JobFilesError(JobError):
    """Files beside the output that do not fit what is asked for; nothing is done until the user has chosen."""
