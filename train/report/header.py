"""The head of the report: name and outcome of the run, its main numbers, and its environment."""

from typing import Any

from markupsafe import Markup

from .markup import format_duration, format_number, render
from .run_record import FILES, Record

TONES = {"finished": "good", "failed": "bad", "preempted": "warn", "unfinished": "warn"}


def header(record: Record) -> Markup:
    """Name, outcome, a line about model and mesh, tiles of numbers, and missing files."""
    return render(
        "header",
        record=record,
        tone=TONES[record.status],
        subtitle=subtitle(record),
        origins=provenance(record),
        failure=record.events_named("failure")[-1] if record.status == "failed" else None,
        tiles=tiles(record),
        files=FILES,
    )


def subtitle(record: Record) -> list[str]:
    """`Llama`, `4 layers of 192`, `2.6M parameters`, `data 2 × tensor 2`, `8 devices (cpu)`, as far as known."""
    parts = []
    model = record.config.get("model") or {}
    if family := model.get("family"):
        parts.append(str(family).title())
    if model.get("layers") and model.get("embed"):
        parts.append(f"{model['layers']} layers of {model['embed']}")
    if parameters := record.plan.get("parameters"):
        parts.append(f"{format_number(parameters['count'])} parameters")
    if axes := [f"{axis} {size}" for axis, size in (record.plan.get("mesh") or {}).items() if size > 1]:
        parts.append(" × ".join(axes))
    if devices := record.plan.get("devices"):
        parts.append(f"{len(devices)} device{'s' if len(devices) > 1 else ''} ({devices[0].get('kind', '?')})")
    return parts


def provenance(record: Record) -> list[str]:
    """`corpus 9d1c6f20b7a4e835`, `jax 0.10.2`, `flax 0.12.8`, `Python 3.11.7`."""
    parts = []
    if fingerprint := (record.environment.get("corpus") or {}).get("fingerprint"):
        parts.append(f"corpus {fingerprint}")
    versions = record.environment.get("versions") or {}
    parts += [f"{name} {versions[name]}" for name in ("meshwright", "jax", "flax") if name in versions]
    return [*parts, f"Python {record.environment['python']}"] if "python" in record.environment else parts


def tiles(record: Record) -> list[tuple[str, str, str]]:
    """(label, value, note) of the main numbers; unknown ones are left out."""
    rows = []
    if (loss := record.latest("loss")) is not None:
        total = f" of {record.config['steps']}" if "steps" in record.config else ""
        rows.append(("training loss", f"{loss:.3f}", f"step {record.metrics[-1]['step']}{total}"))
    if (bits := record.latest("held_out_bits_per_byte")) is not None:
        gzip = (record.environment.get("corpus") or {}).get("gzip_bits_per_byte")
        rows.append(("held-out bits per byte", f"{bits:.3f}", f"gzip -9: {gzip:.3f}" if gzip is not None else ""))
    if (perplexity := record.latest("held_out_perplexity")) is not None:
        rows.append(("held-out perplexity", format_number(perplexity), f"loss {record.latest('held_out_loss'):.3f}"))
    if (rate := record.median("tokens_per_second")) is not None:
        seconds = record.median("step_seconds")
        rows.append(("tokens/s", format_number(rate), f"{seconds:.3g} s a step" if seconds is not None else ""))
    if (mfu := record.median("mfu")) is not None:
        host, step = record.median("host_seconds"), record.median("step_seconds")
        rows.append(("MFU", f"{mfu:.1%}", f"host: {host / step:.1%} of a step" if host is not None and step else ""))
    if record.seconds > 0:
        sessions = len(list(record.sessions()))
        rows.append(("duration", format_duration(record.seconds), f"in {sessions} sessions" if sessions > 1 else ""))
    return rows


def environment_section(record: Record) -> Markup | None:
    """Versions, machine, corpus and tokenizer, from environment.json. None if it is missing."""
    environment = record.environment
    if not environment:
        return None
    machine = {key: environment[key] for key in ("python", "platform", "processes", "seed") if key in environment}
    groups = {
        "Versions": environment.get("versions") or {},
        "Machine": {**machine, "devices": device_summary(environment.get("devices") or [])},
        "Corpus": environment.get("corpus") or {},
        "Tokenizer": environment.get("tokenizer") or {},
    }
    facts = {
        title: [(key.replace("_", " "), format_value(value)) for key, value in values.items()]
        for title, values in groups.items()
        if values
    }
    return render("environment", groups=facts)


def format_value(value: Any) -> str | Markup:
    """A value of environment.json: integers have thousands separators, and long words may break."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return Markup('<span class="breakable">{}</span>').format(text)


def device_summary(devices: list[Any]) -> str:
    """The number of devices of each kind: `8 × cpu`."""
    names = [str(device.get("kind", device)) if isinstance(device, dict) else str(device) for device in devices]
    kinds = [name.rsplit(" ", 1)[0] if name.rsplit(" ", 1)[-1].isdigit() else name for name in names]
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
