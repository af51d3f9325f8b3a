"""The head of the report: which run this is, how it ended, and its few numbers."""

from collections.abc import Mapping
from typing import Any

from .markup import Html, compact, duration, element, joined, section, table
from .run_record import FILES, Record

TONES = {"finished": "good", "failed": "bad", "preempted": "warn", "unfinished": "warn"}


def header(record: Record) -> Html:
    """Name, outcome, a line about model and mesh, the tiles, and what is missing."""
    badge = element("b", record.status, class_=f"badge {TONES[record.status]}")
    return element(
        "header",
        element("h1", record.name, " ", badge),
        element("p", " · ".join(subtitle(record)), element("br"), " · ".join(origins(record)), class_="subtitle"),
        failure(record),
        element("div", *tiles(record), class_="tiles"),
        missing(record),
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
        words.append(f"{compact(parameters['count'])} parameters")
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


def failure(record: Record) -> Html | None:
    """What the run failed of, where it did."""
    if record.status != "failed":
        return None
    event = record.of("failure")[-1]
    return element(
        "p", element("b", event.get("error", "failure")), f": {event.get('message', '')}", class_="alert bad"
    )


def tiles(record: Record) -> list[Html]:
    """The numbers one looks for first; those that are not known are left out."""
    found = []
    if (loss := record.last("loss")) is not None:
        found.append(tile("training loss", f"{loss:.3f}", f"step {record.metrics[-1]['step']}{of_steps(record)}"))
    if (bits := record.last("held_out_bits_per_byte")) is not None:
        found.append(tile("held-out bits per byte", f"{bits:.3f}", beside_gzip(record)))
    if (perplexity := record.last("held_out_perplexity")) is not None:
        found.append(tile("held-out perplexity", compact(perplexity), f"loss {record.last('held_out_loss'):.3f}"))
    if (rate := record.typical("tokens_per_second")) is not None:
        seconds = record.typical("step_seconds")
        found.append(tile("tokens/s", compact(rate), f"{seconds:.3g} s a step" if seconds is not None else ""))
    if (mfu := record.typical("mfu")) is not None:
        found.append(tile("MFU", f"{mfu:.1%}", host_share(record)))
    if record.seconds > 0:
        sittings = len(list(record.sittings()))
        found.append(tile("duration", duration(record.seconds), f"in {sittings} sittings" if sittings > 1 else ""))
    return found


def tile(label: str, value: str, note: str) -> Html:
    """One number, large."""
    return element("div", element("span", label), element("strong", value), element("small", note), class_="tile")


def of_steps(record: Record) -> str:
    """` of 200`, where the configuration says how many there will be."""
    return f" of {record.config['steps']}" if "steps" in record.config else ""


def beside_gzip(record: Record) -> str:
    """What gzip needs for the same bytes."""
    gzip = (record.environment.get("corpus") or {}).get("gzip_bits_per_byte")
    return f"gzip -9: {gzip:.3f}" if gzip is not None else ""


def host_share(record: Record) -> str:
    """How much of a step the host works while the device may wait for it."""
    host, step = record.typical("host_seconds"), record.typical("step_seconds")
    return f"host: {host / step:.1%} of a step" if host is not None and step else ""


def missing(record: Record) -> Html | None:
    """The files that are not there, and what the report lacks for it."""
    if not record.missing:
        return None
    lines = [
        element("li", element("code", file), f" {why}: without it the report lacks {FILES[file]}")
        for file, why in record.missing.items()
    ]
    return element("ul", *lines, class_="alert warn")


def surroundings(record: Record) -> Html | None:
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
    tables = [facts(title, group) for title, group in groups.items() if group]
    return section("Environment", element("div", *tables, class_="columns"))


def facts(title: str, values: Mapping[str, Any]) -> Html:
    """Two columns of names and values."""
    rows = [(key.replace("_", " "), stated(value)) for key, value in values.items()]
    return element("div", table((title, ""), rows), class_="facts")


def stated(value: Any) -> Html:
    """A value of environment.json: numbers grouped by thousands, long words allowed to break."""
    if isinstance(value, float):
        return joined([f"{value:.4g}"])
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return element("span", text, class_="breakable")


def brief(devices: list[Any]) -> str:
    """`8 × cpu`: how many of each kind."""
    names = [str(device.get("kind", device)) if isinstance(device, dict) else str(device) for device in devices]
    kinds = [name.rsplit(" ", 1)[0] if name.rsplit(" ", 1)[-1].isdigit() else name for name in names]
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
