"""Where runs of bench.quality spend their tokens, and where they err: python -m bench.quality.where VARIANT…

The tables come from the lines of bench/results/quality.jsonl; `bench.quality.places` says what they hold.
"""

from __future__ import annotations

from ..machine import read_lines
from .sets import SCALE
from .study import RESULTS, arguments


def main() -> None:
    """Print a table for each variant."""
    args = arguments(__doc__).parse_args()
    results = [{**SCALE, **result} for result in read_lines(RESULTS)]
    key = {"set": args.data.name, "width": args.width, "steps": args.steps, "seed": args.seed}
    key |= {"ratio": args.ratio, "cell": args.cell}
    for name in args.variants:
        for result in results:
            if "where" in result and {**key, "variant": name}.items() <= result.items():
                print(
                    f"\n| {name}: t | loss | kept of foreground | of background | loss of foreground | of background |"
                )
                print("|---|---|---|---|---|---|")
                for t, loss, front, back, front_loss, back_loss in result["where"]:
                    print(f"| {t} | {loss:.4f} | {front:.1%} | {back:.1%} | {front_loss:.4f} | {back_loss:.4f} |")


if __name__ == "__main__":
    main()
