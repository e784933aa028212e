"""The model card of an exported encoder: architecture, training data, expected input, usage."""

from pera_jax import objectives
from pera_jax.bands import Bands
from pera_jax.encoder.load import Weights


def text(weights: Weights, which: str, height: int, width: int) -> str:
    """The text of README.md, as shown on the Hugging Face Hub.

    Args:
      which: "teacher" or "student".
      height, width: px, the image size of the position embedding.
    """
    meta, bands = weights.meta, Bands.from_metadata(weights.meta)
    shape, trained = meta["model"], meta["model"]["image_size"]
    grid = f"{height // shape['patch']} x {width // shape['patch']}"
    tokens = f"[B, 1 + {grid.replace('x', '*')}, {shape['width']}]"
    embedding = (
        "as trained" if (height, width) == (trained, trained)
        else f"interpolated from {trained} x {trained} px, the size in training"
    )  # fmt: skip
    rows = "\n".join(
        f"| {number} | {name} | {low} | {high} | {mean} | {std} |"
        for number, (name, (low, high), mean, std) in enumerate(
            zip(bands.names, bands.ranges, bands.mean, bands.std, strict=True)
        )
    )
    vectors = "\n".join(
        f"{name} = torch.tensor({list(map(float, values))}).view(1, -1, 1, 1)"
        for name, values in zip(
            ("low", "high", "mean", "std"), (*zip(*bands.ranges), bands.mean, bands.std), strict=True
        )
    )
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- remote-sensing
---
# {meta["config"]["name"]}, {which} at step {weights.step}

A vision transformer: width {shape["width"]}, {shape["depth"]} blocks, {shape["heads"]} heads, patches of
{shape["patch"]} px, {shape["bands"]} band(s), no classifier. {_origin(meta, weights.step)}

## Input

Images of {height} x {width} px, {grid} patches; the position embedding is {embedding}. Bands in this order, stored
as {bands.dtype}. Values from "low" to "high" map to [0, 1] and are clipped outside; then subtract the mean and divide
by the std:

| channel | band | low | high | mean | std |
|---|---|---|---|---|---|
{rows}

`mean` and `std` in config.json are the same, for values in [0, 1].

## Use

```python
import timm, torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # the folder with this file
{vectors}
images = ...  # [B, {shape["bands"]}, {height}, {width}], stored values
x = (((images.float() - low) / (high - low)).clamp(0, 1) - mean) / std
tokens = model.forward_features(x)  # {tokens} after the final norm: class token, patches
features = model(x)  # [B, {shape["width"]}], the class token
```
"""


def _origin(meta: dict, step: int) -> str:
    if "imported" in meta:
        file, digest = meta["imported"]["file"], meta["imported"]["sha256"]
        return f"Its weights were imported from the file {file} (SHA-256 `{digest}`), not trained with pera_jax."
    data = meta["data"]
    return (
        f"Pre-trained without labels for {step:,} steps of {meta['config']['batch_size']:,} images by "
        f"{_citation(meta)} on {data['name']}: {data['records']:,} images, "
        f"fingerprint `{data['fingerprint']}`; pera_jax, revision `{meta['git']}`."
    )


def _citation(meta: dict) -> str:
    """The citation of the method that trained a checkpoint, which need not be installed unless the checkpoint is of an
    earlier version."""
    return meta["method"]["citation"] if "method" in meta else objectives.method(meta["config"]["objective"]).citation
