"""Take what bench.quality.farm brought into bench/results: python -m bench.quality.collect FOLDER (of quality.tar.gz)

The lines of the results are appended to quality.jsonl and quality_drawn.jsonl. The losses of each run are
written as a hundred means.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from ..arguments import existing
from ..machine import read_lines
from .study import DRAWN, RESULTS

SPANS = 100
KEYS = ("step", "diffusion_loss", "kept")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=existing)
    args = parser.parse_args()
    for name in (RESULTS.name, DRAWN):
        for file in sorted(args.folder.glob(f"runs/*/{name}")):
            with open(RESULTS.with_name(name), "a", encoding="utf-8") as stream:
                stream.write(file.read_text(encoding="utf-8"))
    for file in sorted(args.folder.glob("runs/*/*/*/metrics.jsonl")):
        rows = read_lines(file)
        target = RESULTS.with_suffix("") / file.parts[-3] / f"{file.parts[-2]}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps(row) + "\n" for row in means(rows)), encoding="utf-8")


def means(rows: list[dict]) -> list[dict]:
    """The means of each of SPANS parts of the rows."""
    parts = np.array_split(np.array([[row[key] for key in KEYS] for row in rows]), min(SPANS, len(rows)))
    return [dict(zip(KEYS, part.mean(0).round(5).tolist(), strict=True)) for part in parts]


if __name__ == "__main__":
    main()
