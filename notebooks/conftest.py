"""A notebook that takes longer than two minutes in all fails; nbmake's own limit is for a single cell."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

LIMIT_SECONDS = float(os.environ.get("NOTEBOOK_LIMIT_SECONDS", "120"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Turns a pass that came too late into a failure."""
    report = yield
    if call.when == "call" and report.passed and call.duration > LIMIT_SECONDS:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.name} took {call.duration:.0f} s, more than {LIMIT_SECONDS:.0f}. Make it shorter or, on a slow or "
            "busy machine, set NOTEBOOK_LIMIT_SECONDS."
        )
    return report
