"""`Finding`: what a check has to say."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from seesaw.core.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that stands in a job's way, or may."""

    severity: Literal["error", "warning"]
    """`error`: the job cannot succeed. `warning`: it may fail."""
    what: str
    remedy: str
    """What would help."""

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def settle(findings: Iterable[Finding]) -> None:
    """Log each finding in a line of its own. Raises `ConfigError` with the first that is an error."""
    errors = []
    for finding in findings:
        if finding.severity == "error":
            errors.append(finding)
        else:
            logger.warning("preflight: %s", finding)
    for further in errors[1:]:
        logger.error("preflight: %s", further)
    if errors:
        raise ConfigError(f"preflight: {errors[0]}")
