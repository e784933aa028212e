"""An encoder for the PANGAEA benchmark, from weights exported by `pera-jax export timm`.

    encoder = PerA("exported", {"optical": ["B4", "B3", "B2"]})
    maps = encoder({"optical": images})  # [B, C, H, W] or [B, C, T, H, W] -> a list of [B, D, h, w]

In the PANGAEA repository, derive the class from its `Encoder` instead of `torch.nn.Module`, and remove normalization
from the preprocessing: the encoder takes stored values and normalizes them with the statistics stored beside its
weights.
"""

import json
import pathlib

import timm
import torch


class PerA(torch.nn.Module):
    model_name, multi_temporal, multi_temporal_output, pyramid_output = "pera", False, False, False

    def __init__(
        self, folder: str, input_bands: dict[str, list[str]] | None = None, output_layers: list[int] | None = None
    ):
        """
        Args:
          folder: the exported folder.
          input_bands: {modality: band names in the benchmark}, in the order of the bands of the weights; default: the
            latter.
          output_layers: 0-based block indices; default: four, evenly spaced.
        """
        super().__init__()
        stored = json.loads((pathlib.Path(folder) / "config.json").read_text())["pera_jax"]
        self.vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
        depth, self.embed_dim = len(self.vit.blocks), self.vit.embed_dim
        self.input_bands, self.input_size = input_bands or {"optical": stored["bands"]}, stored["image_size"][0]
        self.output_layers = output_layers or [depth * part // 4 - 1 for part in (1, 2, 3, 4)]
        self.output_dim = [self.embed_dim] * len(self.output_layers)
        low, high = zip(*stored["ranges"], strict=True)
        for name, values in (("low", low), ("high", high), ("mean", stored["mean"]), ("std", stored["std"])):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def load_encoder_weights(self, logger) -> None:
        logger.info(f"{self.model_name}: weights are loaded with the network")

    def forward(self, image: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Feature maps after the final norm; averaged over the dates."""
        (modality,) = self.input_bands
        x = image[modality] if image[modality].ndim == 5 else image[modality].unsqueeze(2)  # [B, C, T, H, W]
        dates, x = x.shape[2], x.movedim(2, 1).flatten(0, 1).float()  # [B T, C, H, W]
        x = (((x - self.low) / (self.high - self.low)).clamp(0, 1) - self.mean) / self.std
        maps = self.vit.forward_intermediates(x, indices=self.output_layers, norm=True, intermediates_only=True)
        return [each.unflatten(0, (-1, dates)).mean(1) for each in maps]
