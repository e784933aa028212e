"""Sizes of named vision transformers, for `config.model.variant`."""

import re
from typing import Any

from pera_jax.common.errors import UserError

# Width, depth, heads by name; "B/16" is "B" with patches of 16 px (Dosovitskiy et al., arXiv:2010.11929; Zhai et al.,
# arXiv:2106.04560). "G-1024" is the large model of arXiv:2505.19447.
VARIANTS = {
    "Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16),
    "g": (1408, 40, 16), "G": (1664, 48, 16), "G-1024": (1024, 40, 16),
}  # fmt: skip


def sizes(model: Any) -> dict[str, Any]:
    """Width, depth, heads, patch and MLP ratio of `config.model`; fields that are 0 come from its variant.

    Raises:
      UserError: unknown variant.
    """
    found = re.fullmatch(r"(\w+)/(\d+)(-\d+)?", model["variant"])
    name = found and found[1] + (found[3] or "")
    if name not in VARIANTS or not int(found[2]):
        raise UserError(
            f"model.variant={model['variant']!r} is invalid; expected NAME/PATCH with NAME one of "
            f"{', '.join(VARIANTS)}, "
            'such as "B/16" or "G/16-1024"'
        )
    known = dict(zip(("width", "depth", "heads"), VARIANTS[name])) | {"patch": int(found[2])}
    return {field: model[field] or value for field, value in known.items()} | {"mlp_ratio": model["mlp_ratio"]}
