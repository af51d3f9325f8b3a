"""The head of the report: which run this is, how it ended, and its few numbers."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from .markup import format_duration, format_number, render
from .run_record import FILES, Record

TONES = {"finished": "good", "failed": "bad", "preempted": "warn", "unfinished": "warn"}


def header(record: Record) -> Markup:
    """Name, outcome, a line about model and mesh, the tiles, and what is missing."""
    return render(
        "header",
        record=record,
        tone=TONES[record.status],
        subtitle=subtitle(record),
        origins=origins(record),
        failure=record.events_named("failure")[-1] if record.status == "failed" else None,
        tiles=tiles(record),
        files=FILES,
    )


def subtitle(record: Record) -> list[str]:
    """`Llama`, `4 layers of 192`, `2.6M parameters`, `data 2 × tensor 2`, `8 devices`, as far as they are known."""
    words = []
    model = record.config.get("model") or {}
    if family := model.get("family"):
        words.append(str(family).title())
    if model.get("layers") and model.get("embed"):
        words.append(f"{model['layers']} layers of {model['embed']}")
    if parameters := record.plan.get("parameters"):
        words.append(f"{format_number(parameters['count'])} parameters")
    if axes := [f"{axis} {size}" for axis, size in (record.plan.get("mesh") or {}).items() if size > 1]:
        words.append(" × ".join(axes))
    if devices := record.plan.get("devices"):
        words.append(f"{len(devices)} device{'s' if len(devices) > 1 else ''} ({devices[0].get('kind', '?')})")
    return words


def origins(record: Record) -> list[str]:
    """What the numbers came of: the corpus's fingerprint, `jax 0.10.2`, `flax 0.12.8`, `Python 3.11.7`."""
    words = []
    if fingerprint := (record.environment.get("corpus") or {}).get("fingerprint"):
        words.append(f"corpus {fingerprint}")
    versions = record.environment.get("versions") or {}
    words += [f"{name} {versions[name]}" for name in ("meshwright", "jax", "flax") if name in versions]
    return [*words, f"Python {record.environment['python']}"] if "python" in record.environment else words


def tiles(record: Record) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers one looks for first; those that are not known are left out."""
    found = []
    if (loss := record.latest("loss")) is not None:
        found.append(("training loss", f"{loss:.3f}", f"step {record.metrics[-1]['step']}{of_steps(record)}"))
    if (bits := record.latest("held_out_bits_per_byte")) is not None:
        found.append(("held-out bits per byte", f"{bits:.3f}", beside_gzip(record)))
    if (perplexity := record.latest("held_out_perplexity")) is not None:
        found.append(("held-out perplexity", format_number(perplexity), f"loss {record.latest('held_out_loss'):.3f}"))
    if (rate := record.median("tokens_per_second")) is not None:
        seconds = record.median("step_seconds")
        found.append(("tokens/s", format_number(rate), f"{seconds:.3g} s a step" if seconds is not None else ""))
    if (mfu := record.median("mfu")) is not None:
        found.append(("MFU", f"{mfu:.1%}", host_share(record)))
    if record.seconds > 0:
        sittings = len(list(record.sessions()))
        found.append(("duration", format_duration(record.seconds), f"in {sittings} sittings" if sittings > 1 else ""))
    return found


def of_steps(record: Record) -> str:
    """` of 200`, where the configuration says how many there will be."""
    return f" of {record.config['steps']}" if "steps" in record.config else ""


def beside_gzip(record: Record) -> str:
    """What gzip needs for the same bytes."""
    gzip = (record.environment.get("corpus") or {}).get("gzip_bits_per_byte")
    return f"gzip -9: {gzip:.3f}" if gzip is not None else ""


def host_share(record: Record) -> str:
    """How much of a step the host works while the device may wait for it."""
    host, step = record.median("host_seconds"), record.median("step_seconds")
    return f"host: {host / step:.1%} of a step" if host is not None and step else ""


def surroundings(record: Record) -> Markup | None:
    """Versions, machine, corpus, tokenizer, from environment.json. None where it is missing."""
    told = record.environment
    if not told:
        return None
    machine = {key: told[key] for key in ("python", "platform", "processes", "seed") if key in told}
    groups = {
        "Versions": told.get("versions") or {},
        "Machine": {**machine, "devices": brief(told.get("devices") or [])},
        "Corpus": told.get("corpus") or {},
        "Tokenizer": told.get("tokenizer") or {},
    }
    return render("environment", groups={title: facts(values) for title, values in groups.items() if values})


def facts(values: Mapping[str, Any]) -> list[tuple[str, str | Markup]]:
    """Names and values: numbers grouped by thousands, long words allowed to break."""
    return [(key.replace("_", " "), stated(value)) for key, value in values.items()]


def stated(value: Any) -> str | Markup:
    """A value of environment.json."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return Markup('<span class="breakable">{}</span>').format(text)


def brief(devices: list[Any]) -> str:
    """`8 × cpu`: how many of each kind."""
    names = [str(device.get("kind", device)) if isinstance(device, dict) else str(device) for device in devices]
    kinds = [name.rsplit(" ", 1)[0] if name.rsplit(" ", 1)[-1].isdigit() else name for name in names]
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
