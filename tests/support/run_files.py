"""What a run has written, for tests that compare runs."""

import json
import pathlib


def metrics_of(workdir) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]
