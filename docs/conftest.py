"""What the pages' examples find: ``here``, a folder that is thrown away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _here(doctest_namespace: dict[str, Any], tmp_path: Path) -> None:
    doctest_namespace["here"] = tmp_path
