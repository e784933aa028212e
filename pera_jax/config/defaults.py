"""Every field of a config with its default, and `:smoke`.

A config file starts from `default()` and sets what differs; unknown fields are refused. Fields of a single method are
in `config.<method>`. Durations are strings with a unit: "20 epochs", "1500 steps", "96000 examples", "10 percent".
"""

from ml_collections import ConfigDict

from pera_jax import objectives
from pera_jax.common.errors import UserError
from pera_jax.objectives import check


def default(objective: str = "pera") -> ConfigDict:
    """The default config of a method; for "pera", the published ViT-B/16 of arXiv:2505.19447, section IV-A.

    Args:
      objective: one of `objectives.METHODS`, or the name of a module of one's own.

    Raises:
      UserError: no such method.
    """
    config = ConfigDict(
        dict(
            name=objective,
            objective=objective,
            seed=0,
            total="200 epochs",
            batch_size=1024,  # global: all devices of all hosts
            accumulate=1,  # number of microbatches per batch, processed one after the other to save memory
            precision="bfloat16",  # of matrix products: bfloat16 or float32
            parameter_precision="float32",  # of everything else; float64 needs jax_enable_x64
            # Where to start if the workdir has no checkpoint; "" for none. resume_from: a run to resume (state,
            # optimizer and step). init_from: a run or an import by `pera_jax.export`, of which only weights are used.
            resume_from="",
            init_from="",
        )
    )
    config.data = dict(
        path="",  # dataset folder; several, with commas between, are mixed
        weights=(),  # of several folders: how often to draw from each, as in (3, 1); (): as many as each has records
        split="train",
        workers=-1,  # processes that read, decode and crop; -1: one for each two cores of the host, 16 at most
        bands=(),  # names of the bands to use, in this order; (): all that the dataset has
        # Names of the bands that are red, green and blue, for color changes and pictures; (): the bands are just these
        # three.
        rgb=(),
        # What maps to [0, 1], in stored units: ((low, high),) for all bands, or a pair for each; (): what the dataset
        # says, the full range of uint8, percentiles 1 and 99 of others.
        ranges=(),
        skip_damaged=False,  # train without shards that are missing or damaged: their records are replaced by others
        normalize="imagenet",  # "imagenet", or "dataset": the mean and std of the data
        allow_changed_data=False,  # resume from a checkpoint although the dataset's fingerprint is another
    )
    config.crops = dict(
        global_size=448,
        global_number=2,
        global_area=(0.4, 1.0),
        local_size=96,
        local_number=8,
        local_area=(0.05, 0.4),
        aspect=(0.75, 1.33),
        flip=0.5,  # probability of each of the two flips
    )
    config.model = dict(
        variant="B/16",  # name/patch in px, see models/variants.py; a field below that is not 0 counts instead
        width=0,
        depth=0,
        heads=0,
        patch=0,
        mlp_ratio=4.0,
        scan=True,  # one block compiled, looped over; False: unrolled, which compiles slower and runs a little faster
        remat="block",  # recomputed in the backward pass: "none", "dots" (all but the linear maps), whole "block"s
        attention="auto",  # "cudnn", "xla", or "auto": cuDNN's fused kernel on GPUs that have it
    )
    config.drop_path = dict(rate=0.3, group=16)  # stochastic depth; group in images, 0 for the whole batch
    config.optimizer = dict(
        beta1=0.9,
        beta2=0.999,
        eps=2e-5,
        # Whether Adam's 1 - beta ** step is computed as precisely as in PyTorch. False: in float32, which is up to
        # 6e-5 off in the first steps, as in runs of earlier versions.
        exact_bias_correction=False,
        # Gradients are clipped by the norm of all of them ("global"), of each network and head ("groups"), or of each
        # one ("parameter"); or not at all ("none").
        clip="global",
        clip_norm=3.0,
        # "all" parameters, "no_bias_or_norm" (nor LayerScale), or "matrices": also no tokens and gains
        decay="all",
        rate_factors=(),  # of the learning rate, ((path regex, factor), ...): the first match counts, 0.0 freezes
        layer_decay=1.0,  # factor of the learning rate from each block of the backbone to the one below it
    )
    config.schedules = dict(
        learning_rate=dict(start=0.0, peak=1e-3, end=1e-6, warmup="20 epochs"),
        weight_decay=dict(start=0.04, end=0.2),
    )
    # Nearest neighbors among a few labeled images, in training: the metric "monitor/knn20".
    config.monitor = dict(
        data="",  # dataset folder with classes, of the same bands; "": no monitor
        split="train",
        images=1000,  # at most, the same number of each class where there are as many; held in memory
        every="5 percent",
    )
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # one of them may be -1: the devices that are left
    config.log_every = "50 steps"
    # Seconds without a finished step after which a process prints where its threads stand and ends; 0: never. The first
    # step compiles and the longest save must fit in.
    config.stall_seconds = 1800
    config.checkpoint = dict(
        every="1 epochs",
        keep_last=3,
        keep_every="50 epochs",  # kept for good besides the last ones
    )
    own = objectives.method(objective)
    config[check.group(own, config)] = own.default_config()
    own.set_defaults(config)
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks a config to run in seconds on a laptop: the same code paths with tiny sizes."""
    config.name += "_smoke"
    config.total = "4 steps"
    config.batch_size = 16
    config.data.workers = 0
    config.crops.update(dict(global_size=48, local_size=32))
    config.crops.local_number = min(config.crops.local_number, 2)
    config.model.update(dict(width=32, depth=4, heads=2, patch=8))
    config.drop_path.group = min(config.drop_path.group, 2)
    config.schedules.learning_rate.warmup = "1 steps"
    config.log_every = "1 steps"
    config.checkpoint.update(dict(every="2 steps", keep_every="100 percent"))
    objectives.method(config.objective).shrink(config)
    return config


def limit_groups(config: ConfigDict, images: int) -> None:
    """Limits the group sizes of drop path and of the objective's loss terms to `images`."""
    config.drop_path.group = min(config.drop_path.group, images)
    objectives.method(config.objective).limit_groups(config, images)


def finish(config: ConfigDict, argument: str | None) -> ConfigDict:
    """Applies the argument after the colon of `--config FILE.py:ARGUMENT`: nothing, or `smoke`.

    Raises:
      UserError: another argument.
    """
    if argument not in (None, "", "smoke"):
        raise UserError(f"the config takes no argument {argument!r}; only `:smoke` is known")
    return smoke(config) if argument == "smoke" else config
