"""Fine-tunes weights exported by `pera-jax export timm` on class folders of RGB images.

    python examples/finetune.py exported aid --output tuned.pth

reads aid/train/CLASS/NAME.jpg and aid/test/CLASS/NAME.jpg, and needs torch, torchvision and timm. The learning rate
decays from the last block to the first (layer decay). The test images are used only once, after the last epoch.
"""

import argparse
import json
import math
import pathlib

import timm
import timm.optim
import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="folder of the exported weights")
    parser.add_argument("data", type=pathlib.Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument(
        "--output", required=True, help="output file for the weights with the classifier, and the class names"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--learning-rate", type=float, default=5e-4, help="learning rate of the classifier (default: 5e-4)"
    )
    parser.add_argument(
        "--layer-decay", type=float, default=0.75, help="learning rate factor from each block to the one before"
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = json.loads((pathlib.Path(options.weights) / "config.json").read_text())["pera_jax"]
    if (stored["bands"], stored["dtype"]) != (["red", "green", "blue"], "uint8"):
        raise SystemExit(
            f"{options.weights} expects {stored['dtype']} images with the bands {', '.join(stored['bands'])}, got RGB "
            "files; export RGB weights"
        )

    size, to_input = stored["image_size"], [v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                                            v2.Normalize(stored["mean"], stored["std"])]  # fmt: skip
    augment = v2.Compose(
        [v2.RandomResizedCrop(size, (0.4, 1)), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), *to_input]
    )
    train = datasets.ImageFolder(options.data / "train", augment)
    test = datasets.ImageFolder(options.data / "test", v2.Compose([v2.Resize(size), *to_input]))
    if train.classes != test.classes:
        raise SystemExit(f"the class folders of train and test differ in {options.data}; give both the same classes")
    batches = DataLoader(train, options.batch_size, shuffle=True, num_workers=options.workers)

    model = timm.create_model(f"local-dir:{options.weights}", pretrained=True, num_classes=len(train.classes)).to(
        device
    )
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=options.layer_decay)
    groups = [group | {"lr": options.learning_rate * group["lr_scale"]} for group in groups]
    optimizer, total = torch.optim.AdamW(groups), options.epochs * len(batches)
    rate = lambda step: min((step + 1) / (0.1 * total), (1 + math.cos(math.pi * step / total)) / 2)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    for epoch in range(options.epochs):
        model.train()
        losses = []
        for images, labels in batches:
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{options.epochs}: loss {sum(losses) / len(losses):.3f}", flush=True)

    model.eval()
    with torch.no_grad():
        correct = sum(
            (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
            for images, labels in DataLoader(test, options.batch_size, num_workers=options.workers)
        )
    torch.save({"model": model.state_dict(), "classes": train.classes}, options.output)
    print(f"{correct} of {len(test)} test images correct: {correct / len(test):.4f}; written to {options.output}")


if __name__ == "__main__":
    main()
