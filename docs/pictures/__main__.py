"""``python -m docs.pictures``: draw the README's pictures anew, after new results."""

from pathlib import Path

from docs.pictures import readme

for name, svg in readme():
    (Path(__file__).parent / f"{name}.svg").write_text(svg, encoding="utf-8")
