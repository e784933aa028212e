"""Runs a conversion as an Apache Beam pipeline, on this machine or on Dataflow, Flink or Spark.

    pera-jax prep-beam images --input aid/train --output shards/aid --split train -- --runner=DirectRunner
    pera-jax prep-beam tfds --dataset /mnt/tfds/eurosat/rgb/2.0.0 --output /mnt/shards/eurosat --split train \\
        -- --runner=FlinkRunner --flink_master=HOST:8081 --environment_type=DOCKER --environment_config=IMAGE

First the command (images, scenes or tfds) with its options, as in `pera-jax prep-COMMAND`; after -- the options
of Beam. The dataset folder is the same byte for byte as without Beam, and either command can resume the other.

* Inputs and --output must be on a mount that this machine and all workers see under the same path (NFS, Filestore, a
  bucket with gcsfuse), since workers write shards directly.
* A compressed tar is read from the start for each shard: unpack it, or convert it to a plain tar or zip.
* Workers need this package and its requirements, for example a container image with requirements-beam.txt and this
  checkout.
* Equal bytes require equal encoders: changed images are encoded by Pillow, whose versions may differ.
  Pillow 12.3 (requirements-beam.txt) and 13.0 (requirements.txt) write the same bytes; `make test-beam` compares them.
"""

import argparse
import functools
import importlib
import sys

from data_prep.convert import beam_jobs
from pera_jax.common.errors import UserError, run

COMMANDS = ("images", "scenes", "tfds")  # modules of this package with `main(argv, driver)`


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError."""
    given = sys.argv[1:] if argv is None else argv
    at = given.index("--") if "--" in given else len(given)
    own, options = given[:at], given[at + 1 :]
    usage = "pera-jax prep-beam COMMAND OPTIONS -- BEAM'S OPTIONS"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args(own[:1]).command
    if any(option.split("=")[0] == "--workers" for option in own):
        raise UserError("--workers only applies to local processes; pass the option of the runner after --")
    beam_jobs.check_installed()
    driver = functools.partial(beam_jobs.run_jobs, options=options)
    importlib.import_module(f"data_prep.{command}").main(own[1:], driver=driver)


if __name__ == "__main__":
    run(main)
