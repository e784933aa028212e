"""The report command: one self-contained HTML page about a run and what it has learned.

    pera-jax report --run runs/aid --data shards/aid --output report

writes report/index.html, and each figure as a PNG beside it: the views of the networks, a PCA of the patch tokens, the
attention of the class token, nearest neighbors. The page also has scores, training curves, confusion matrices, scenes
and the config. Sections without data are listed at the end.
"""

import argparse

from pera_jax.common import errors, paths
from pera_jax.common.text import printable
from pera_jax.reports.job import report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="pera-jax report", description="Writes an HTML page about a run.")
    parser.add_argument("--run", required=True, type=paths.local, help="run folder (the --workdir of the training)")
    parser.add_argument(
        "--data", type=paths.local, help="dataset folder (default: the training data, if it still exists)"
    )
    parser.add_argument(
        "--output", required=True, type=paths.local, help="output folder for index.html and the figures"
    )
    parser.add_argument(
        "--no-verify", action="store_false", dest="verify", help="do not check the weights against their digests"
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--split", help="split whose images are shown (default: test, or else the training split)")
    parser.add_argument("--images", type=int, default=8, dest="number", help="maximum number of images (default: 8)")
    parser.add_argument(
        "--pairs", type=int, default=6, dest="number_of_pairs", help="maximum number of pairs (default: 6)"
    )
    parser.add_argument("--image-size", type=int, help="px, a multiple of the patch size (default: 32 patches)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for images, crops, augmentation and masks (default: 0)"
    )
    page = report(**vars(parser.parse_args(argv)))
    print(f"written to {printable(page)}, {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    errors.run(main)
