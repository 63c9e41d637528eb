"""What the documents show runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("document", ["docs/backend.md"])
def test_python_in_documents_runs(document: str):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks, f"{document} has no Python"
    for block in blocks:
        exec(compile(block, document, "exec"), {})
