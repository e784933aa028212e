"""The model card of an exported network: what it is, what it was trained on, which input it expects, how to use it."""

from pera_jax import checkpoint
from pera_jax.bands import Bands


def text(weights: checkpoint.Weights, which: str, height: int, width: int) -> str:
    """README.md, as the Hugging Face hub shows it.

    Args:
      which: "teacher" or "student".
      height, width: px, the images that the position embedding is for.
    """
    meta, bands = weights.meta, Bands.of(weights.meta)
    shape, data, trained = meta["model"], meta["data"], meta["model"]["image_size"]
    grid = f"{height // shape['patch']} x {width // shape['patch']}"
    embedding = (
        "as trained" if (height, width) == (trained, trained)
        else f"interpolated from the training's {trained} x {trained} px"
    )  # fmt: skip
    rows = "\n".join(
        f"| {number} | {name} | {low} | {high} | {mean} | {std} |"
        for number, (name, (low, high), mean, std) in enumerate(
            zip(bands.names, bands.ranges, bands.mean, bands.std, strict=True)
        )
    )
    low, high, mean, std = ([str(float(value)) for value in values] for values in (*zip(*bands.ranges), bands.mean, bands.std))
    vectors = "\n".join(
        f"{name} = torch.tensor([{', '.join(values)}]).view(1, -1, 1, 1)"
        for name, values in (("low", low), ("high", high), ("mean", mean), ("std", std))
    )
    return f"""---
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- remote-sensing
---
# {meta["config"]["name"]}, {which} at step {weights.step}

A vision transformer: width {shape["width"]}, {shape["depth"]} blocks, {shape["heads"]} heads, patches of {shape["patch"]} px,
{shape["bands"]} bands, no classifier. {_origin(meta, weights.step)}

Data: {data["name"]}{_records(data)}, fingerprint `{data["fingerprint"]}`. Program: pera_jax, revision `{meta["git"]}`.

## Input

Images of {height} x {width} px ({grid} patches; the position embedding is {embedding}), bands in this order, stored as
{bands.dtype}. Values between "low" and "high" map to 0 and 1, what lies outside is cut; then subtract the mean and divide by
the std:

| channel | band | low | high | mean | std |
|---|---|---|---|---|---|
{rows}

`mean` and `std` of config.json are these, for values in [0, 1].

## Use

```python
import timm, torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # the folder of this file
{vectors}
images = ...  # [B, {shape["bands"]}, {height}, {width}], stored values
x = (((images.float() - low) / (high - low)).clamp(0, 1) - mean) / std
tokens = model.forward_features(x)  # [B, 1 + {grid.replace("x", "*")}, {shape["width"]}] after the final norm: class token, then patches
features = model(x)  # [B, {shape["width"]}], the class token
```
"""


def _origin(meta: dict, step: int) -> str:
    if "imported" in meta:
        return f"Its weights were imported from the file {meta['imported']['file']}, not trained by this program."
    return (
        f"Pre-trained without labels for {step:,} steps of {meta['config']['batch_size']:,} images by PerA (Shen et al., "
        "arXiv:2505.19447)."
    )


def _records(data: dict) -> str:
    return "" if data["records"] is None else f", {data['records']:,} images"
