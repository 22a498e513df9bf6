"""A verdict: what each rule found of a model on its way into a stage."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkeel.core.errors import FedkeelError
from fedkeel.core.registry import Rule
from fedkeel.gate.evidence import Evidence, Finding


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found, rule by rule, in the order of the policy. `against`: the id of what stood at the stage."""

    model: str
    version: str
    fingerprint: str
    stage: str
    against: str | None
    wall: float
    findings: tuple[tuple[str, Finding], ...]

    @property
    def passed(self) -> bool:
        """Whether every rule lets the model pass; without rules nobody judged it, so not."""
        return bool(self.findings) and all(finding.passed for _, finding in self.findings)

    @property
    def reasons(self) -> list[str]:
        """Why it does not pass, a rule each."""
        return [f"{rule}: {finding.text}" for rule, finding in self.findings if not finding.passed]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for ledger, registry, webhook and programs."""
        told = {
            "model": self.model,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "stage": self.stage,
            "against": self.against,
            "wall": self.wall,
            "passed": self.passed,
            "findings": [
                {"rule": rule, "passed": found.passed, "text": found.text, "figures": _finite(found.figures)}
                for rule, found in self.findings
            ],
        }
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return told | {"id": hashlib.sha256(text.encode()).hexdigest()}


def verdict_of(evidence: Evidence, findings: Sequence[tuple[str, Finding]], fingerprint: str) -> Verdict:
    """The verdict on what `evidence` is about."""
    standing = evidence.standing
    job = evidence.job
    against = standing.id if standing else None
    return Verdict(job.name, job.model.version, fingerprint, evidence.stage, against, time.time(), tuple(findings))


def judge(evidence: Evidence, rule: Rule) -> Finding:
    """What a rule finds. A rule that fails does not let the model pass."""
    try:
        found = rule(evidence)
    except FedkeelError as error:
        return Finding(False, str(error))
    except Exception as error:  # a user's rule: a gate that fails is shut
        said = " ".join(str(error).split())[:200]
        return Finding(False, f"the rule failed ({type(error).__name__}: {said}): mend it")
    if not isinstance(found, Finding):
        return Finding(False, f"the rule returned {type(found).__name__}: return a fedkeel.Finding")
    return found


def _finite(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}
