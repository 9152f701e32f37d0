""" "auto" in the backend: sizes that the cost model favours, the same on all ranks."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fgtp_pass import disk_cache
from fgtp_pass.agreement.control_group import Exchange
from fgtp_pass.agreement.message import Intent
from fgtp_pass.calibration.measure import measure
from fgtp_pass.collectives.groups import DataParallelGroup, hostname
from fgtp_pass.cost.advice import choose_sizes
from fgtp_pass.cost.estimate import Cluster
from fgtp_pass.cost.hardware import Hardware, detect, load
from fgtp_pass.cost.shape import component_shapes
from fgtp_pass.detect.detect import Detection
from fgtp_pass.errors import AgreementError
from fgtp_pass.graph.op_kinds import value_of
from fgtp_pass.options.options import MEASURE, Options
from fgtp_pass.options.path_prices import by_time
from fgtp_pass.plan.plan import ChosenSize
from fgtp_pass.plan.planner import plan_graph
from fgtp_pass.plan.prices import Prices
from fgtp_pass.plan.sizes import AUTO

log = logging.getLogger("fgtp_pass")


class SizeChooser:
    """The sizes in force for a data-parallel group.

    sizes: by component; 1 for off, and for "auto" until it is chosen. chosen: what the cost model
    chose. Without a declared decode batch or objective "auto" is the largest size within a host,
    known at once; with one, a component's size is chosen when a graph first shows it.
    """

    def __init__(
        self,
        options: Options,
        group: DataParallelGroup,
        control: Exchange,
        ranks_on_host: int,
        device: torch.device | None = None,
    ):
        self._options = options
        self._device = device  # of the weights; None for that of a graph's own
        self._group = group
        self._control = control
        self._ranks_on_host = ranks_on_host
        self._hardware: Hardware | None = None
        self._by_cost = options.decode_batch is not None or options.objective is not None
        auto: dict[str, int] | None = {} if self._by_cost else None
        self.sizes = options.sizes.resolve(group.size, ranks_on_host, auto)
        self.chosen: dict[str, ChosenSize] = {}
        self._told = False
        self._cluster: Cluster | None = None  # rank 0's, on all ranks

    @property
    def settled(self) -> bool:
        """Whether all sizes are known before any graph is."""
        return not self._by_cost

    def see(self, detection: Detection) -> None:
        """Choose sizes for the components that no graph has shown before.

        Collective: all ranks compile the same graphs, and take what rank 0 chooses. Raises
        AgreementError where they do not see the same components.
        """
        if not self._by_cost:
            return
        asked = self._options.sizes.by_component
        auto = {match.component for match in detection.matches if asked[match.component] == AUTO}
        new = sorted(auto - self.chosen.keys())
        leads = self._group.rank == 0
        if leads and detection.matches and self._hardware is None:
            self._hardware = self._known_hardware(self._weight_of(detection))
        first = bool(detection.matches) and not self._told
        asked_to = self._options.hardware == MEASURE and first
        measures = (bool(new) or asked_to) and self._hardware is None
        payload: dict[str, Any] = {"components": new, "measure": measures}
        messages = self._control.exchange(Intent.SHARD, payload=payload)
        _check_same_components([message.payload for message in messages])
        if not new and self._told:
            return
        if messages[0].payload["measure"]:
            self._measure(self._weight_of(detection))
        choices = self._choose(detection, new) if leads and new else []
        constants = None if self._hardware is None else self._hardware.model_dump(mode="json")
        payload = {"choices": [c.model_dump() for c in choices], "hardware": constants}
        said = self._control.exchange(Intent.SHARD, payload=payload)[0].payload
        for choice in map(ChosenSize.model_validate, said["choices"]):
            self.chosen[choice.component] = choice
            self.sizes[choice.component] = choice.size
        self._told = True
        if said["hardware"] is not None:
            self._cluster = self._cluster_of(Hardware.model_validate(said["hardware"]))

    @property
    def prices(self) -> Prices:
        """What paths are compared by, the same on all ranks.

        Predicted time for a declared decode batch, with the constants of rank 0; else messages and
        bytes.
        """
        batch = self._options.decode_batch
        if batch is None or self._cluster is None:
            return Prices(by_range=True)
        return by_time(self._cluster, self.sizes, batch)

    def _cluster_of(self, hardware: Hardware) -> Cluster:
        return Cluster(hardware, self._group.size, self._ranks_on_host)

    def _choose(self, detection: Detection, components: list[str]) -> list[ChosenSize]:
        assert self._hardware is not None
        sizes = dict.fromkeys(components, 2)
        # each is priced by itself: which of them will be on is what is asked
        plan = plan_graph(detection, sizes, self._group.size, joins=False).plan
        choice = choose_sizes(
            component_shapes(plan, str(self._weight_of(detection).dtype).removeprefix("torch.")),
            self._cluster_of(self._hardware),
            self._options.decode_batch or 1,  # only the objective "memory" goes without
            self._options.objective or "balanced",
        )
        for name, size in choice.sizes.items():
            said = f"{size if size > 1 else 'off'}, {choice.reasons[name]}"
            log.info("auto: %s: %s (on %s)", name, said, self._hardware.title)
        return [
            ChosenSize(component=name, size=size, reason=choice.reasons[name])
            for name, size in choice.sizes.items()
        ]

    def _weight_of(self, detection: Detection) -> torch.Tensor:
        """Stands for the model's weights: their device and dtype."""
        weight: torch.Tensor = value_of(detection.matches[0].parameters[0])
        return weight if self._device is None else weight.new_empty(0, device=self._device)

    # hardware ---------------------------------------------------------------------------------

    def _known_hardware(self, weight: torch.Tensor) -> Hardware | None:
        """The profile asked for, the detected device's, or what was measured here before."""
        asked = self._options.hardware
        if asked is not None:
            return None if asked == MEASURE else load(asked)
        if weight.device.type == "cuda":
            detected = detect(torch.cuda.get_device_name(weight.device))
            if detected is not None:
                return detected
        path = self._kept_at(weight)
        kept = disk_cache.load(path, Hardware)
        if kept is None:
            return None
        assert kept.calibration is not None
        age = datetime.now(UTC) - datetime.fromisoformat(kept.calibration.measured_at)
        log.info("auto: measured %s ago (%s); hardware=%r measures again", age, path, MEASURE)
        return kept

    def _measure(self, weight: torch.Tensor) -> None:
        """Measure with all ranks of the group; rank 0 keeps the result for next time."""
        if self._group.rank == 0:
            log.info("auto: measuring the machine, which takes some seconds")
        self._hardware = measure(self._group, weight.device, [weight.dtype])
        if self._group.rank == 0:
            path = self._kept_at(weight)
            try:
                disk_cache.save(path, self._hardware)
            except OSError as error:
                log.warning("auto: the measurement is not kept for next time: %s", error)

    def _kept_at(self, weight: torch.Tensor) -> Path:
        """One file per machine, number of ranks, device, dtype, threads and version of torch."""
        machine = [hostname(), self._group.size, self._ranks_on_host, torch.get_num_threads()]
        kind = [weight.device.type, str(weight.dtype), torch.__version__]
        return disk_cache.path_of("calibration", *machine, *kind)


def _check_same_components(said: list[dict[str, list[str]]]) -> None:
    if any(payload["components"] != said[0]["components"] for payload in said):
        listed = ", ".join(
            f"rank {rank}: {payload['components']}" for rank, payload in enumerate(said)
        )
        raise AgreementError(
            f"the data-parallel ranks see different components ({listed}). "
            "They must run the same model with the same options and libraries."
        )
