"""A masked autoencoder in a page: a method without a teacher and without state, for the contract's tests.

The encoder sees a random part of the patches; a linear decoder guesses the mean of each band in every patch from the
class token. It learns little, and uses everything that a method needs.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from pera_jax.bands import Bands
from pera_jax.models import flops, vit
from pera_jax.models.precision import Precision
from pera_jax.objectives import base, watched


@dataclasses.dataclass(frozen=True)
class ToyMae(base.Base):
    encoder: vit.ViT
    bands: Bands
    precision: Precision
    crops: dict[str, base.CropSpec]
    kept: int  # patches that the encoder sees

    name: ClassVar = "toy_mae"
    citation: ClassVar = "a toy masked autoencoder"
    sharding_rules: ClassVar = ((r"decoder/kernel$", P("fsdp")), (r"decoder/bias$", P()))
    decay_rules: ClassVar = ((r"decoder/kernel$", True), (r"decoder/bias$", False))
    curves: ClassVar = (("Loss terms", (watched.Panel("Error", False, True, {"loss/error": "error"}),)),)

    @classmethod
    def default_config(cls):
        return ConfigDict(dict(kept=0.25))

    @classmethod
    def from_config(cls, config, bands, device=None):
        encoder, crops = vit.from_config(config, len(bands), device), base.crop_specs(config.crops)
        patches = (encoder.image_size // encoder.patch) ** 2
        return cls(encoder, bands, encoder.precision, {"global": crops["global"]}, round(config.toy_mae.kept * patches))

    @property
    def decoder(self):
        patches = (self.encoder.image_size // self.encoder.patch) ** 2
        return nn.Dense(patches * len(self.bands), dtype=self.precision.compute, param_dtype=self.precision.wide)

    def init(self, key):
        side, encoder_key, decoder_key = self.encoder.image_size, *jax.random.split(key)
        image = jnp.zeros((1, side, side, len(self.bands)), self.precision.wide)
        token = jnp.zeros((1, self.encoder.width), self.precision.wide)
        return {"backbone": self.encoder.init(encoder_key, image)["params"],
                "decoder": self.decoder.init(decoder_key, token)["params"]}  # fmt: skip

    def prepare(self, rngs, batch):
        images = batch["global"]  # [B, V, S, S, C]
        words = jax.random.bits(
            rngs("masks"), (*images.shape[:2], (self.encoder.image_size // self.encoder.patch) ** 2)
        )
        return {"images": images, "kept": jnp.argsort(words, axis=-1)[..., : self.kept].astype(jnp.int32)}

    def loss(self, params, teacher, state, examples, context):
        images, kept = jax.tree.map(
            lambda x: rearrange(x, "b v ... -> (b v) ..."), (examples["images"], examples["kept"])
        )
        images = self.bands.normalized(images, self.precision.wide)  # [B V, S, S, C]
        patches = rearrange(vit.patchify(images, self.encoder.patch), "n l (p c) -> n l p c", c=len(self.bands))
        token = self.encoder.apply({"params": params["backbone"]}, images, kept)["class_token"]  # [B V, D]
        guess = self.decoder.apply({"params": params["decoder"]}, token).astype(self.precision.wide)
        error = jnp.mean(jnp.square(guess - rearrange(patches.mean(axis=2), "n l c -> n (l c)")))
        return error, {"loss": error, "loss/error": error}

    def flops_per_image(self):
        number, vit_ = self.crops["global"].number, self.encoder
        encoder = flops.TRAINED * vit_.depth * flops.block(vit_, 1 + self.kept)
        embedding = flops.TRAINED_FIRST * flops.embedding(vit_, self.kept)
        patches = (vit_.image_size // vit_.patch) ** 2
        return {"encoder": number * (encoder + embedding),
                "decoder": number * flops.TRAINED * 2 * vit_.width * patches * len(self.bands)}  # fmt: skip


OBJECTIVE = ToyMae
