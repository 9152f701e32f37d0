"""Random traffic against `vllm serve`: what came back, what was lost, and the memory meanwhile."""

from __future__ import annotations

import random
import re
import statistics
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fork_server import session
from openai import OpenAI
from servers import Served

CLIENTS = 12
PATIENCE = 300  # seconds; a request that takes longer is lost
# by phase: how many clients ask at once, and how long a client rests between two requests
PHASES = {"burst": (CLIENTS, 0.0), "busy": (6, 0.2), "thin": (1, 0.5), "idle": (0, 0.0)}
_PHASE_SECONDS = (2.0, 12.0)
_SAMPLE_SECONDS = 2.0


@dataclass
class Soaked:
    """What came of it. did: requests by kind. memory: MiB by process, over the time."""

    did: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    memory: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    preemptions: int = 0

    def growth(self) -> dict[str, float]:
        """MiB by process from the second quarter of the time to the last, by their medians."""
        grown = {}
        for name, all_of in self.memory.items():
            quarter = max(1, len(all_of) // 4)
            first, last = all_of[quarter : 2 * quarter], all_of[-quarter:]
            grown[name] = statistics.median(last) - statistics.median(first or last)
        return grown

    def __str__(self) -> str:
        grown = ", ".join(
            f"{name} {of[-1]:.0f} MiB ({self.growth()[name]:+.0f})"
            for name, of in sorted(self.memory.items())
        )
        return (
            f"requests {dict(self.did)}, {self.tokens} tokens; {len(self.wrong)} wrong, "
            f"{len(self.lost)} lost; {self.preemptions} preemptions; phases {dict(self.phases)}; "
            f"memory and growth since the second quarter: {grown}"
        )


class Soak:
    """Clients that ask for `prompts` in random ways, and compare with `want`, token by token."""

    def __init__(
        self,
        served: Served,
        model: str,
        prompts: Mapping[int, Sequence[int]],
        want: Mapping[int, Sequence[int]],
        seed: int = 0,
    ):
        self._served, self._model, self._prompts, self._want = served, model, prompts, want
        self._seed = seed
        self._asking, self._rest = 0, 0.0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.result = Soaked()

    def run(self, seconds: float) -> Soaked:
        deadline = time.monotonic() + seconds
        sampler = threading.Thread(target=self._sample, daemon=True)
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._client, number) for number in range(CLIENTS)]
            sampler.start()
            source, order = random.Random(self._seed), list[str]()
            while (left := deadline - time.monotonic()) > 0:
                order = order or source.sample(sorted(PHASES), len(PHASES))
                name = order.pop()
                self._asking, self._rest = PHASES[name]
                self.result.phases[name] += 1
                self._over.wait(min(left, source.uniform(*_PHASE_SECONDS)))
            self._over.set()
            for client in clients:
                client.result()
        sampler.join()
        self.result.preemptions = self._preemptions()
        return self.result

    def _client(self, number: int) -> None:
        source = random.Random(1000 * self._seed + number)
        url = self._served.url
        client = OpenAI(base_url=url, api_key="none", timeout=PATIENCE, max_retries=0)
        while not self._over.is_set():
            if number >= self._asking:
                self._over.wait(0.1)
                continue
            kind = source.choice(("whole", "whole", "stream", "stream", "leave"))
            prompt = source.choice(sorted(self._prompts))
            try:
                got = getattr(self, f"_{kind}")(client, prompt, source)
            except Exception as error:
                with self._lock:
                    self.result.lost.append(f"{kind} of {prompt}: {type(error).__name__}: {error}")
                continue
            with self._lock:
                self._note(kind, prompt, got)
            self._over.wait(source.uniform(0, 2 * self._rest))

    def _note(self, kind: str, prompt: int, got: list[int]) -> None:
        self.result.did[kind] += 1
        self.result.tokens += len(got)
        want = list(self._want[prompt])
        if got != (want[: len(got)] if kind == "leave" else want):
            self.result.wrong.append(f"{kind} of {prompt}: {got} for {want}")

    def _ask(self, client: OpenAI, prompt: int, stream: bool) -> Any:
        return client.completions.create(
            model=self._model,
            prompt=list(self._prompts[prompt]),
            max_tokens=len(self._want[prompt]),
            temperature=0,
            stream=stream,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )

    def _whole(self, client: OpenAI, prompt: int, source: random.Random) -> list[int]:
        return list(self._ask(client, prompt, stream=False).choices[0].token_ids)

    def _stream(self, client: OpenAI, prompt: int, source: random.Random) -> list[int]:
        parts = self._ask(client, prompt, stream=True)
        return [token for part in parts if part.choices for token in part.choices[0].token_ids]

    def _leave(self, client: OpenAI, prompt: int, source: random.Random) -> list[int]:
        """A client that goes away in the middle; what it has seen until then."""
        seen: list[int] = []
        enough = source.randrange(1, len(self._want[prompt]))
        with self._ask(client, prompt, stream=True) as parts:
            for part in parts:
                seen += part.choices[0].token_ids if part.choices else []
                if len(seen) >= enough:
                    break
        return seen

    def _sample(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            for process in session(self._served.process.pid):
                memory = process.memory_full_info().uss / 2**20
                name = (process.name(), process.pid)
                self.result.memory[f"{name[0]} {name[1]}"].append(memory)

    def _preemptions(self) -> int:
        url = f"http://127.0.0.1:{self._served.port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        counts = re.findall(r"^vllm:num_preemptions_total\S* ([\d.e+]+)$", text, re.M)
        return int(sum(map(float, counts)))
