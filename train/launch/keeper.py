"""A keeper's process: `python -m meshwright.train.launch.keeper SETTINGS`, SETTINGS a JSON object. JAX-free.

One thread tells the rendezvous what this host has and hears what the others have; the main one protects. It ends with
the process that started it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...checkpoint.keeper import Keeper
from ...checkpoint.wire import Listener
from .rendezvous import Client, Refused

OFTEN = 0.02  # seconds between two words
IDLE = 0.5  # seconds between two words, and two looks, where nothing is new
FOREVER = 1e9  # time-to-live: whether a keeper is alive is seen by whoever started it
PREFIX = "keeper/"


def keepers_in(members: Mapping[str, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """What each keeper told, by host, out of a membership."""
    return {int(name[len(PREFIX) :]): info for name, info in members.items() if name.startswith(PREFIX)}


def news(infos: Mapping[int, Mapping[str, Any]]) -> list[Any]:
    """What matters of what the keepers told."""
    return [(host, info["address"], info["held"], info["shares"]) for host, info in sorted(infos.items())]


class Telling:
    """The thread that talks to the rendezvous."""

    def __init__(self, keeper: Keeper, *, rendezvous: str, address: str) -> None:
        self.infos: dict[int, Mapping[str, Any]] = {}
        self.heard = threading.Event()  # something new
        self.ended = threading.Event()
        self._keeper, self._place, self._address, self._beats = keeper, rendezvous, address, 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        seen, info, spoken = None, dict[str, Any](), 0.0
        with Client(self._place, f"{PREFIX}{self._keeper.host}", ttl=FOREVER) as client:
            while not self.ended.wait(OFTEN):
                try:
                    heads, now = self._keeper.heads(), time.monotonic()
                    if heads == seen and now - spoken < IDLE and not self._keeper.busy:
                        continue
                    if heads != seen:
                        info = self._keeper.info()
                    self._tell(client, info)
                    seen, spoken = heads, now
                except Refused:  # another keeper of this host took over: this one is fenced
                    self.ended.set()
                except OSError:
                    continue  # the rendezvous is gone, or the slots are changing

    def _tell(self, client: Client, info: Mapping[str, Any]) -> None:
        self._beats += 1
        told = {"address": self._address, "beats": self._beats, "trouble": self._keeper.trouble, **info}
        infos = keepers_in((client.beat if client.ticket >= 0 else client.join)(told)["members"])
        if news(infos) != news(self.infos):
            self.infos = infos
            self.heard.set()


def main() -> None:
    """Keep until the process that started this one is gone."""
    settings = json.loads(sys.argv[1])
    parent = os.getppid()
    directory = Path(settings["directory"])
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(directory / ".lock", poll_interval=OFTEN, fallback_to_soft=False)  # held until the process ends
    lock.acquire()  # an older keeper of this host may be about to end
    keeper = Keeper(
        directory,
        host=settings["host"],
        places=settings["places"],
        groups=settings["groups"],
        losses=settings["losses"],
    )
    with Listener(keeper.answer, settings["name"], bind=settings["bind"]) as listener:
        telling = Telling(keeper, rendezvous=settings["rendezvous"], address=listener.address)
        while os.getppid() == parent and not telling.ended.is_set():
            telling.heard.wait(IDLE)
            telling.heard.clear()
            if telling.infos:
                keeper.look(telling.infos)


if __name__ == "__main__":
    main()
