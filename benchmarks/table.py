"""Makes the tables of README, `benchmarks/RESULTS.md` and `docs/`, and the pictures, from committed JSON files.

python -m benchmarks.table          # writes them
python -m benchmarks.table --all    # prints every row of every result, as Markdown
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from . import auto_table, costs, lossless, models, page, pareto, summary
from .gpu import docs
from .markers import insert

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Writes all of them, or prints all rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="print every row of every result, and write nothing")
    if parser.parse_args().all:
        print(page.every_row(page.load()))
        return
    for path, text in documents().items():
        path.write_text(text)
    for result in page.load():
        pareto.draw(result, page.RESULTS / f"pareto_{summary.name_of(result)}.png")


def documents() -> Mapping[Path, str]:
    """Each document to its text with what is made from the committed files in it."""
    results, readme, dbcache = page.load(), ROOT / "README.md", ROOT / "docs" / "dbcache.md"
    host = json.loads((page.RESULTS / "host_cost.json").read_text())
    return {
        ROOT / "benchmarks" / "RESULTS.md": page.text(results),
        readme: insert(insert(readme.read_text(), summary.headline(results)), docs.in_short(), "gpu"),
        dbcache: insert(dbcache.read_text(), costs.host_line(host), "host cost"),
        docs.PAGE: docs.renewed(docs.PAGE.read_text()),
        auto_table.PAGE: auto_table.renewed(auto_table.PAGE.read_text()),
        lossless.PAGE: lossless.renewed(lossless.PAGE.read_text()),
        models.PAGE: models.renewed(models.PAGE.read_text()),
    }


if __name__ == "__main__":
    main()
