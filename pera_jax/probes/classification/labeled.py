"""What the classification tasks get: frozen features of whole images, and labels."""

import dataclasses

import numpy as np

from pera_jax.encoder.extract import Features


@dataclasses.dataclass(frozen=True)
class Labelled:
    """
    Attributes:
      train, test: features of N and M images; `test` is None for a small set that has no split of its own.
      train_labels, test_labels: int64 [N] below the number of classes, or bool [N, classes]: several labels for an image.
    """

    train: Features
    test: Features | None
    train_labels: np.ndarray
    test_labels: np.ndarray | None
    class_names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.class_names)
