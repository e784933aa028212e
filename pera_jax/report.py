"""The report job: what a run is and what it has learned, on one page that needs no network.

    python -m pera_jax.report --run runs/aid --data shards/aid --output report

writes report/index.html and beside it each picture as a PNG: pairs as the networks see them and the student's guess,
patch tokens as colours, the class token's attention, nearest neighbours; on the page also scores, curves, classes,
scenes and the config. What a run does not have yet is left out, which the page says.
"""

import argparse

from pera_jax.common import errors, paths
from pera_jax.common.text import printable
from pera_jax.reports.job import report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pera_jax.report", description="A page about a run.")
    parser.add_argument("--run", required=True, type=paths.local, help="folder of the run (the --workdir of the training)")
    parser.add_argument("--data", type=paths.local, help="data set folder (default: the one that was trained on, if it is still there)")
    parser.add_argument("--output", required=True, type=paths.local, help="folder for index.html and the pictures")
    parser.add_argument("--no-verify", action="store_false", dest="verify", help="do not compare the weights with their digests")
    parser.add_argument("--step", type=int, help="the checkpoint (default: the latest)")
    parser.add_argument("--split", help="split whose images are shown (default: test, else the one trained on)")
    parser.add_argument("--images", type=int, default=8, dest="number", help="shown at most (default 8)")
    parser.add_argument("--pairs", type=int, default=6, dest="number_of_pairs", help="shown at most (default 6)")
    parser.add_argument("--image-size", type=int, help="px, a multiple of the patch (default: 32 patches)")
    parser.add_argument("--seed", type=int, default=0, help="of images, crops, looks and masks (default 0)")
    page = report(**vars(parser.parse_args(argv)))
    print(f"written to {printable(page)}, {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    errors.run(main)
