"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

import fastcnn

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), flags=re.DOTALL)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_block_runs(block: str) -> None:
    with fastcnn.use_backend("auto"):  # which the block may change
        exec(compile(block, "README.md", "exec"), {})
