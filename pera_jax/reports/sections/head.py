"""The head of the page: configuration, progress and cost of the run."""

from typing import Any

import jax
import numpy as np

from pera_jax import objectives
from pera_jax.common import html
from pera_jax.reports.folder import Folder
from pera_jax.reports.sections.curves import column

_ALARMS = 20  # listed at most


def alarms(folder: Folder) -> str:
    """The alarms of the training as HTML; "" without alarms."""
    if not folder.alarms:
        return ""
    lines = "".join(
        f"<li>step {html.escaped(alarm.get('step', '?'))}, {html.escaped(alarm['alarm'])}: "
        f"{html.escaped(alarm.get('text', ''))}</li>"
        for alarm in folder.alarms[-_ALARMS:]
    )
    number = len(folder.alarms)
    title = f"{number} training alarms" if number > 1 else "1 training alarm"
    last = f", the last {_ALARMS}" if number > _ALARMS else ""
    return f'<div class="warn alarms"><b>{title}{last}:</b><ul>{lines}</ul></div>'


def run_facts(folder: Folder) -> list[tuple[str, object]]:
    config = folder.meta["config"]
    last, total = folder.last_step, config["total"]
    state = f"finished at step {last:,}" if folder.finished else f"not finished: step {last:,} is the last logged step"
    shown = "none" if folder.step is None else f"step {folder.step:,}"
    return [
        ("folder", folder.path.resolve()), ("state", f"{state}, planned: {total}"), ("checkpoint shown", shown),
        ("program", f"git {folder.meta['git']}"), ("objective", config["objective"]), ("seed", config["seed"]),
    ]  # fmt: skip


def model_facts(meta: dict[str, Any]) -> list[tuple[str, object]]:
    model, objective = meta["model"], objectives.from_metadata(meta)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    heads = sum(count.values()) - count["backbone"]
    crops = [f"{spec.number} {name} of {spec.size} px" for name, spec in objective.crops.items()]
    return [
        ("transformer", "width {width}, depth {depth}, {heads} heads, patch {patch} px".format(**model)),
        (
            "parameters",
            f"{count['backbone'] / 1e6:,.2f} M of the encoder, {heads / 1e6:,.2f} M of heads and other parts",
        ),
        ("crops per image", ", ".join(crops)),
        ("batch", f"{meta['config']['batch_size']:,} images"),
    ]


def data_facts(meta: dict[str, Any]) -> list[tuple[str, object]]:
    data = meta["data"]
    names = data.get("class_names")
    facts = [
        ("dataset", f"{data['name']}, split {data['split']}"), ("records", f"{data['records']:,}"),
        ("fingerprint", data["fingerprint"][:16]), ("values", meta["dtype"]),
    ]  # fmt: skip
    for part in data.get("sets", []):
        facts.append((f"part {part['name']}", f"{part['records']:,} records, sampled with {part['share']:.1%}"))
    return facts + ([("classes", f"{len(names)}, not used in training")] if names else [])


def band_table(meta: dict[str, Any]) -> str:
    rows = [["band", "black", "white", "mean", "std"]]
    for name, (low, high), mean, std in zip(meta["bands"], meta["ranges"], meta["mean"], meta["std"], strict=True):
        rows.append([name, f"{low:,.6g}", f"{high:,.6g}", f"{mean:.4f}", f"{std:.4f}"])
    return html.table(rows)


def cost_facts(folder: Folder) -> list[tuple[str, object]]:
    """Images, time and FLOPs from the logged metrics; time excludes start-up and interruptions."""
    meta, batch = folder.meta, folder.meta["config"]["batch_size"]
    per_image = sum(objectives.from_metadata(meta).flops_per_image().values())
    images = folder.last_step * batch
    facts: list[tuple[str, object]] = [
        ("images seen", f"{images:,}, {images / meta['data']['records']:,.1f} epochs"),
        ("compute", f"{_flop(per_image)} per image (matrix products)"),
    ]
    replaced = column(folder.metrics, "data/replaced")[1]
    if len(replaced):
        facts.append(("unreadable images", f"{replaced[-1]:,.0f}, replaced by others"))
    steps, rates = column(folder.metrics, "time/images_per_second")
    if not len(steps) or not (rates > 0).all():
        return facts
    seconds = float(np.sum(np.diff(steps, prepend=0.0) * batch / rates))
    facts.append(
        ("time", f"{seconds / 3600:,.2f} hours in training steps, {steps[-1] * batch / seconds:,.1f} images/s")
    )
    each = column(folder.metrics, "time/images_per_second_per_chip")[1]
    if len(each) == len(rates):
        facts.append(("devices", f"{round(float(rates[-1] / each[-1]))}"))
    facts.append(("total compute", f"{_flop(per_image * images)}, {_flop(per_image * images / seconds)}/s"))
    mfu = column(folder.metrics, "time/mfu")[1]
    if len(mfu):
        facts.append(("MFU", f"{mfu.mean():.1%} of the devices' peak bf16 FLOP/s"))
    waiting = column(folder.metrics, "time/data_wait_share")[1]
    if len(waiting):
        facts.append(("waiting for data", f"{waiting.mean():.1%} of the time"))
    return facts


def _flop(value: float) -> str:
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10.0**power:
            return f"{value / 10.0**power:,.3g} {letter}FLOP"
    return f"{value:,.0f} FLOP"


def section(folder: Folder) -> str:
    blocks = (
        ("Run", html.facts(run_facts(folder))),
        ("Model", html.facts(model_facts(folder.meta))),
        ("Data", html.facts(data_facts(folder.meta)) + band_table(folder.meta)),
        ("Cost", html.facts(cost_facts(folder))),
    )
    cards = "".join(f"<div><h3>{title}</h3>{content}</div>" for title, content in blocks)
    return f'{alarms(folder)}<div class="cards">{cards}</div>'
