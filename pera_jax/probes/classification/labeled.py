"""The input of the classification tasks: frozen features of whole images, and labels."""

import dataclasses

import numpy as np

from pera_jax.encoder.extract import Features


@dataclasses.dataclass(frozen=True)
class Labeled:
    """
    Attributes:
      train, test: features of N training and M test images; `test` is None for leave-one-out on a small dataset.
      train_labels, test_labels: int64 [N] below `classes`, or bool [N, classes] for multi-label images; [M] likewise.
    """

    train: Features
    test: Features | None
    train_labels: np.ndarray
    test_labels: np.ndarray | None
    class_names: tuple[str, ...]

    @property
    def classes(self) -> int:
        return len(self.class_names)
