"""Files that a command did not write are never overwritten, only its own (see also `test_tools`, `test_report`)."""

import json

import pytest
from PIL import Image

from pera_jax import plan
from pera_jax.common import errors, owned
from pera_jax.encoder import stablehlo
from pera_jax.probes.runner import results

FOREIGN = (
    b"my notes\n",
    b"<html><body>mine</body></html>",
    b'{"mine": 1}',
    b"a,b\n1,2\n",
    b"\x89PNG\r\n\x1a\n....IHDR",
)


def test_what_this_program_wrote_is_known(tmp_path):
    file = tmp_path / "file"
    owned.check(file)
    for content in (b"", owned.png(Image.new("L", (9, 9))), owned.png(Image.new("RGB", (900, 900)), optimize=True),
                    owned.json_text({"a": [1]})):  # fmt: skip
        file.write_bytes(content)
        owned.check(file)
    assert json.loads(owned.json_text({"a": [1]})) == {"written_by": "pera_jax", "a": [1]}
    for content in FOREIGN:
        file.write_bytes(content)
        for own in (owned.marked, stablehlo._ours):
            with pytest.raises(
                errors.UserError,
                match="file already exists and was not written by this command; choose another --output",
            ):
                owned.check(file, own)
        assert file.read_bytes() == content


def test_before_any_work_is_done(tmp_path):
    for name in ("results.csv", "plan.json"):
        (tmp_path / name).write_bytes(b"my,notes\n")
    with pytest.raises(errors.UserError, match="results.csv already exists and was not written by this command"):
        results.check_writable(tmp_path)
    with pytest.raises(errors.UserError, match="plan.json already exists .*choose another --json"):
        plan.main(["--config", "none.py", "--topology", "v5e:2x2", "--json", str(tmp_path / "plan.json")])
