"""The parts of one rank's memory, as estimated (`estimate.py`) and as measured (`meter.py`)."""

from dataclasses import asdict, dataclass, replace

# Parts of a host's memory that are parts of the device's too: titles by whether the blocks are always trained.
STATES = {True: "states, always on", False: "states, active blocks"}
WEIGHTS = "weights"
# On the host only while one group steps.
GROUP_GRADIENTS = "gradients of a group"


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one rank's device, estimated or measured: what exists between steps, within a step, and the peaks."""

    weights: int
    always_on_states: int  # masters and moments of always-trained blocks
    active_states: int  # of the others
    buffers: int  # buckets, stage 3's gradient partitions and persistent parameters
    activations: int  # at the end of the forward pass
    logits: int
    gathered: int  # weights that stage 3 has whole at the end of the forward pass
    gradients: int  # at the end of the backward pass, beyond the buffers
    peak_backward: int  # of forward and backward, everything included
    peak_step: int  # of the optimizer's step, everything included
    # At the peak of the backward pass; estimated alone, since a measurement cannot tell what it sees.
    gradients_by_then: int = 0
    buckets_by_then: int = 0
    reference: int = 0  # the model as it was before, which some tasks compare with; estimated alone
    pool: int = 0  # beyond the peak, that a stream of copies has or waits for: reserved, and so not measured

    @property
    def static(self) -> int:
        """Bytes between two steps."""
        return self.weights + self.reference + self.always_on_states + self.active_states + self.buffers

    def with_reference(self, nbytes: int) -> "MemoryParts":
        """The same with so many bytes of a reference model, at all times."""
        return replace(self._raised(nbytes), reference=nbytes)

    def with_buffer(self, nbytes: int) -> "MemoryParts":
        """The same with a buffer more of so many bytes: a measurement does not tell a reference model from one."""
        return replace(self._raised(nbytes), buffers=self.buffers + nbytes)

    def _raised(self, nbytes: int) -> "MemoryParts":
        return replace(self, peak_backward=self.peak_backward + nbytes, peak_step=self.peak_step + nbytes)

    @property
    def peak(self) -> int:
        """The most at any time of a step."""
        return max(self.peak_backward, self.peak_step)

    @property
    def needed(self) -> int:
        """What a GPU must have for tensors."""
        return self.peak + self.pool

    @property
    def temporary(self) -> int:
        """The bytes of the peak that no other part has."""
        at_backward = self.static + self.activations + self.logits + self.gathered
        at_step = self.static + self.gradients
        return max(0, self.peak - (at_backward if self.is_backward else at_step))

    @property
    def is_backward(self) -> bool:
        """Whether the peak is of the forward and backward pass, and not of the optimizer's step."""
        return self.peak_backward >= self.peak_step

    def beyond(self) -> dict[str, int]:
        """What an estimate has at the peak beside the other parts, by what has it.

        Of a backward pass the gradients that have arrived, their buckets, and what the passes allocate for a moment.
        """
        if not self.is_backward:
            return {"by_then": 0, "buckets_at_peak": 0, "passes": 0, "step": self.temporary}
        arrived = self.gradients_by_then + self.buckets_by_then
        passes = max(0, self.temporary - arrived)
        found = {"by_then": self.gradients_by_then, "buckets_at_peak": self.buckets_by_then}
        return found | {"passes": passes, "step": 0}

    def at_peak(self) -> dict[str, int]:
        """All parts at the peak: those of a plan add up to it.

        Late in a backward pass fewer activations are left than the forward pass has stored.
        """
        parts = self.to_dict()
        if not self.is_backward:
            return parts | dict.fromkeys(("activations", "logits", "gathered"), 0)
        left = self.peak - self.static - sum(self.beyond().values())
        for name in ("gathered", "activations", "logits"):
            parts[name] = min(parts[name], left)
            left -= parts[name]
        return parts | {"gradients": 0}

    def with_logits_as_activations(self) -> "MemoryParts":
        """As a GPU is measured, whose allocator does not tell what it is asked for."""
        return replace(self, activations=self.activations + self.logits, logits=0)

    def with_host(self, host: dict[str, int], gradients_beside: int) -> "MemoryParts":
        """Device and host (the parts of `plan_memory`) as one, which is what they are on CPU.

        `gradients_beside` are those that wait while a group on the host steps.
        """
        lasting = sum(host.values()) - host.get(GROUP_GRADIENTS, 0)
        weights, always_on, active = (host.get(name, 0) for name in (WEIGHTS, STATES[True], STATES[False]))
        return replace(
            self,
            weights=self.weights + weights,
            always_on_states=self.always_on_states + always_on,
            active_states=self.active_states + active,
            buffers=self.buffers + lasting - weights - always_on - active,
            peak_backward=self.peak_backward + lasting,
            # The norm, or a group on the device, steps at another time than a group on the host.
            peak_step=max(self.peak_step + lasting, self.static + gradients_beside + sum(host.values())),
        )

    def to_dict(self) -> dict[str, int]:
        """All parts and what is derived from them."""
        derived = {"static": self.static, "temporary": self.temporary, "peak": self.peak}
        return asdict(self) | derived | self.beyond()
