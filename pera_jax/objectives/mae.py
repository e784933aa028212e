"""MAE: masked autoencoding with a deep encoder of the visible patches (He et al., Masked Autoencoders Are Scalable
Vision Learners, arXiv:2111.06377)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict

from pera_jax.bands import Bands, as_bytes, band_order
from pera_jax.common.errors import UserError
from pera_jax.losses import pixels
from pera_jax.models import attention, decoder, flops, vit
from pera_jax.models.decoder import Decoder
from pera_jax.models.precision import Precision
from pera_jax.models.vit import ViT, patchify
from pera_jax.objectives import base, official_formats, watched
from pera_jax.objectives.base import Context, CropSpec, Layout, Streams
from pera_jax.objectives.watched import Condition, HealthChecks, Panel, Preview

_CONDITIONS = (
    Condition(
        "nothing is predicted", "explained", 0.02, 0.05, True,
        "the prediction explains only {explained:.1%} of the removed patches' pixels; lower "
        "schedules.learning_rate.peak, or choose a smaller mae.removed",
    ),
    *watched.COMMON_CONDITIONS,
)  # fmt: skip
_HIDDEN = (225, 225, 225)  # of patches that a column of the preview does not show


@dataclasses.dataclass(frozen=True)
class MAE(base.Base):
    """The MAE objective. Its methods are pure functions of the parameters; there is no teacher and no state.

    Attributes:
      encoder: sees only the kept patches of a crop, and has fixed positions.
      kept: number of patches per crop that the encoder sees.
      norm_targets: whether a target is normalized by mean and standard deviation of its own patch.
    """

    encoder: ViT
    decoder: Decoder
    precision: Precision
    crops: dict[str, CropSpec]
    kept: int
    norm_targets: bool
    bands: Bands

    name: ClassVar = "mae"
    citation: ClassVar = "MAE (He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377)"
    evaluated: ClassVar = "student"
    fixed_fields: ClassVar = ("decoder",)
    sharding_rules: ClassVar = decoder.SHARDING_RULES
    decay_rules: ClassVar = decoder.DECAY_RULES
    official: ClassVar = official_formats.Mae()
    curves: ClassVar = (
        ("Loss terms", (
            Panel("Squared error of removed patches", True, True, {"loss": "error"}),
            Panel("Fraction of the removed patches' pixels that is explained", False, True, {"explained": "fraction"}),
        )),
    )  # fmt: skip

    # ---------------------------------------------------------------- facts

    @classmethod
    def default_config(cls) -> ConfigDict:
        """The published ViT-B/16."""
        own = ConfigDict()
        own.removed = 0.75  # fraction of the patches that are removed; floor(L (1 - removed)) of L are kept
        own.norm_targets = True  # targets are normalized by mean and standard deviation of their own patch
        own.decoder = dict(width=512, depth=8, heads=16)
        return own

    @classmethod
    def set_defaults(cls, config: ConfigDict) -> None:
        """The published recipe (appendix A.1), with flips on both axes as for all methods."""
        config.total, config.batch_size = "800 epochs", 4096
        config.crops.update(dict(global_size=224, global_number=1, global_area=(0.2, 1.0), local_number=0))
        config.drop_path.update(dict(rate=0.0, group=0))
        config.optimizer.update(
            dict(exact_bias_correction=True, beta1=0.9, beta2=0.95, eps=1e-8, clip="none", decay="no_bias_or_norm")
        )
        # The peak is 1.5e-4 x batch_size / 256: change both together.
        config.schedules.learning_rate.update(dict(start=0.0, peak=2.4e-3, end=0.0, warmup="40 epochs"))
        config.schedules.weight_decay.update(dict(start=0.05, end=0.05))

    @classmethod
    def shrink(cls, config: ConfigDict) -> None:
        config.mae.decoder.update(dict(width=16, depth=2, heads=2))

    @classmethod
    def validate(cls, config: ConfigDict, layout: Layout) -> None:
        own = config.mae
        if config.crops.local_number:
            raise UserError(
                f"crops.local_number={config.crops.local_number} must be 0, because MAE has one type of crops; set it "
                "to 0"
            )
        if config.drop_path.rate:
            raise UserError(f"drop_path.rate={config.drop_path.rate} must be 0, because MAE has no drop path")
        if isinstance(own.removed, bool) or not isinstance(own.removed, int | float) or not 0 < own.removed < 1:
            raise UserError(f"mae.removed={own.removed!r} must be in (0, 1)")
        if not isinstance(own.norm_targets, bool):
            raise UserError(f"mae.norm_targets={own.norm_targets!r} must be True or False")
        width, heads = own.decoder.width, own.decoder.heads
        if width % heads or width % 4:
            raise UserError(
                f"mae.decoder.width={width} is not a multiple of mae.decoder.heads={heads} and of 4; change one of them"
            )

    @classmethod
    def from_config(cls, config, bands: Bands, device: jax.Device | None = None) -> "MAE":
        """Builds the objective from a config.

        Raises:
          UserError: no patch is kept or removed, or sizes are inconsistent.
        """
        own = config.mae
        encoder = vit.from_config(config, len(bands), device, "mae", position="sincos_xy")
        side, sizes = encoder.image_size // encoder.patch, own.decoder
        kept = int(side**2 * (1 - own.removed))
        if not 0 < kept < side**2:
            raise UserError(
                f"mae.removed={own.removed} keeps {kept} of {side**2} patches, but at least one must be kept and one "
                "removed; use larger crops, smaller patches or another fraction"
            )
        return cls(
            encoder=encoder,
            decoder=Decoder(
                sizes.width, sizes.depth, sizes.heads, side, encoder.patch**2 * len(bands), encoder.mlp_ratio,
                scan=encoder.scan, remat=encoder.remat, precision=encoder.precision,
                attention=attention.choose(
                    config.model.attention, encoder.precision, sizes.width // sizes.heads, device
                ),
            ),
            precision=encoder.precision,
            crops=base.crop_specs(config.crops),
            kept=kept,
            norm_targets=own.norm_targets,
            bands=bands,
        )  # fmt: skip

    @property
    def removed(self) -> int:
        """Number of patches per crop that are predicted."""
        return self.decoder.side**2 - self.kept

    def flops_per_image(self) -> dict[str, float]:
        number, vit_, dec = self.crops["global"].number, self.encoder, self.decoder
        ends = 2 * dec.width * ((1 + self.kept) * vit_.width + self.removed * dec.outputs)  # embedding, prediction
        return {
            "encoder": number * (
                flops.TRAINED * vit_.depth * flops.block(vit_, 1 + self.kept)
                + flops.TRAINED_FIRST * flops.embedding(vit_, self.kept)
            ),
            "decoder": number * flops.TRAINED * (dec.depth * flops.block(dec, 1 + dec.side**2) + ends),
        }  # fmt: skip

    def health_checks(self, images: int) -> HealthChecks:
        def averaged(values):
            return watched.common_averages(values) | {"explained": values["explained"]}

        return HealthChecks(
            _CONDITIONS, averaged, lambda averages: {"explained": averages["explained"], "excess_name": "loss"}
        )

    # ---------------------------------------------------------------- the step

    def init(self, key: jax.Array) -> dict[str, Any]:
        """The parameters: `backbone`, `decoder`."""
        encoder_key, decoder_key = jax.random.split(key)
        side, wide = self.crops["global"].size, self.precision.wide
        image = jnp.zeros((1, side, side, self.encoder.bands), wide)
        token, order = jnp.zeros((1, 1, self.encoder.width), wide), np.arange(self.decoder.side**2)[None]
        return {
            "backbone": self.encoder.init(encoder_key, image)["params"],
            "decoder": self.decoder.init(decoder_key, token[:, 0], token, order[:, :1], order[:, 1:])["params"],
        }

    def prepare(self, rngs: Streams, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Adds to the crops [B, V, H, W, C] a uniformly random permutation [B, V, L] of the patches of each, of which
        the encoder sees the first `kept`."""
        images = batch["global"]
        # Ranks of random 32-bit words; ties (in about L^2 / 2^33 of the crops) keep raster order, a negligible bias.
        words = jax.random.bits(rngs("masks"), (*images.shape[:2], self.decoder.side**2))
        return {"images": images, "order": jnp.argsort(words, axis=-1).astype(jnp.int32)}

    def loss(self, params, teacher, state, examples, context: Context):
        """The mean over crops, removed patches and their values of the squared error."""
        return self.loss_on_views(params, *self.views(examples))

    def loss_on_views(self, params: dict[str, Any], images: jax.Array, order: jax.Array):
        """The loss and `aux`; arguments as of `outputs_on_views`."""
        predicted, target, _ = self.outputs_on_views(params, images, order)
        loss = pixels.mean_pixel_term(predicted, target)
        return loss, jax.lax.stop_gradient({"loss": loss, "square": jnp.mean(jnp.square(target))})

    def update(self, state, aux):
        """The metrics. `explained` is 1 - error / mean square of the targets: predicting 0, which for normalized
        targets is the mean color of each patch, explains nothing."""
        return state, {"loss": aux["loss"], "explained": 1 - aux["loss"] / aux["square"]}

    def views(self, examples: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The normalized images [B V, H, W, C] and the permutations [B V, L] of the result of `prepare`."""
        images, order = (rearrange(examples[name], "b v ... -> (b v) ...") for name in ("images", "order"))
        return self.bands.normalized(images, self.precision.wide), order

    def outputs_on_views(
        self, params: dict[str, Any], images: jax.Array, order: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Predictions for the removed patches of normalized images [N, H, W, C], their targets, and their values
        before these are normalized: [N, L - kept, p p C] each.

        Args:
          order: permutations [N, L] of patch indices, of which the first `kept` are kept.
        """
        kept, removed = order[:, : self.kept], order[:, self.kept :]
        encoded = self.encoder.apply({"params": params["backbone"]}, images, kept)
        predicted = self.decoder.apply(
            {"params": params["decoder"]}, encoded["class_token"], encoded["patch_tokens"], kept, removed
        )  # [N, L - kept, p p C]
        patches = patchify(images, self.encoder.patch)  # [N, L, p p C]
        values = jnp.take_along_axis(patches, removed[:, :, None], axis=1)  # [N, L - kept, p p C]
        if not self.norm_targets:
            return predicted, values, values
        mean, deviation = pixels.patch_statistics(values)
        return predicted, (values - mean) / deviation, values

    # ---------------------------------------------------------------- weights and the report

    def adapt(self, params, new, patch: int, source: tuple[str, ...], target: tuple[str, ...]):
        """Converts the decoder's prediction, whose outputs are ordered by row, column, band, to the bands `target`; a
        new layer if the numbers of bands differ."""
        if "decoder" not in params or source == target:
            return params
        order, layer = band_order(source, target), new["decoder"]["prediction"]
        if order is not None:
            columns = np.arange(patch * patch * len(source)).reshape(-1, len(source))[:, order].reshape(-1)
            layer = {name: np.asarray(leaf)[..., columns] for name, leaf in params["decoder"]["prediction"].items()}
        return params | {"decoder": params["decoder"] | {"prediction": layer}}

    def preview(self, networks, batch, rngs, channels) -> Preview:
        """Masks the first crop of each image as in training, and predicts its removed patches. Normalized predictions
        are shown with the mean and standard deviation of the patch that they predict."""
        batch = {"global": batch["global"][:, :1]}

        def predict(params, batch):
            examples = self.prepare(rngs, batch)
            predicted, target, values = self.outputs_on_views(params, *self.views(examples))
            shown = predicted
            if self.norm_targets:
                mean, deviation = pixels.patch_statistics(values)
                shown = predicted * deviation + mean
            return examples["order"][:, 0], predicted, target, shown

        order, predicted, target, shown = jax.device_get(jax.jit(predict)(networks["student"], batch))
        kept, removed = order[:, : self.kept], order[:, self.kept :]
        image = as_bytes(self.bands.mapped(batch["global"][:, 0]), channels)  # [N, H, W, 3]
        patch, rows, side = self.encoder.patch, np.arange(len(image))[:, None], self.decoder.side
        patches = rearrange(image, "n (h p) (w q) c -> n (h w) p q c", p=patch, q=patch)
        shown = rearrange(shown, "n l (p q c) -> n l p q c", p=patch, q=patch)
        seen, guessed, combined = (np.broadcast_to(np.uint8(_HIDDEN), patches.shape).copy() for _ in range(3))
        seen[rows, kept] = combined[rows, kept] = patches[rows, kept]
        guessed[rows, removed] = combined[rows, removed] = as_bytes(self.bands.denormalized(shown), channels)

        def join(patches):
            return rearrange(patches, "n (h w) p q c -> n (h p) (w q) c", w=side)

        columns = {"crop": image, "encoder sees": join(seen), "prediction": join(guessed), "both": join(combined)}
        reading = (
            "Each row is one crop. The encoder sees the patches of the second column; the decoder predicts the removed "
            "ones, in the third column, which the last one joins with those that were seen. Hidden patches are gray."
        )
        what = "variance of the removed patches' pixels"
        if self.norm_targets:
            reading += " Mean and contrast of a removed patch are not predicted: they are taken from the image."
            what = "variance of the pixels within removed patches"
        explained = 1.0 - np.mean((predicted - target) ** 2) / np.mean((target - _plain(target, len(self.bands))) ** 2)
        return Preview(columns, reading, f"The prediction explains {explained:.0%} of the {what}.", {})


def _plain(target: np.ndarray, bands: int) -> np.ndarray:
    """The mean of each band over all patches, as one patch: [p p C]."""
    return np.tile(target.reshape(-1, bands).mean(axis=0), target.shape[-1] // bands)


OBJECTIVE = MAE
