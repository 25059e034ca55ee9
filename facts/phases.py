"""What a model is run for: one declaration per phase, which every other room reads.

Adding a phase is adding its declaration here, or `register` from outside.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """A way to run a model; its tokens, where the user says nothing.

    `backward`      gradients are computed: the model gets labels, and an optimizer may step
    `serves`        new tokens attend over a KV cache, in which they are stored
    `needs_cache`   a model that cannot be served with a cache is refused; otherwise its forward
                    pass is planned as it is
    `tokens`        new tokens of each sequence
    `context`       cached tokens of each sequence before them; 0: the cache begins empty
    `answer`        tokens of an answer, one by one, after the new ones; 0: there are none
    `programs`      the phases that are planned together, in order, as programs of one module
    `run`           what reports call one run
    """

    name: str
    backward: bool = False
    serves: bool = False
    needs_cache: bool = False
    tokens: int = 1024
    context: int = 0
    answer: int = 0
    programs: tuple[str, ...] = ()
    run: str = ""

    def __post_init__(self) -> None:
        if self.backward and self.serves:
            raise ValueError(f"phase {self.name}: there is no backward pass over a KV cache")
        if (self.context or self.answer or self.needs_cache) and not self.serves:
            raise ValueError(f"phase {self.name}: only a phase that serves has a KV cache")
        if not self.programs:
            object.__setattr__(self, "programs", (self.name,))
        if not self.run:
            object.__setattr__(self, "run", self.name)

    @property
    def optimizer(self) -> str:
        """The optimizer where the user names none."""
        return "adamw" if self.backward else "none"

    def check_context(self, context: int) -> None:
        """Raise ValueError for cached tokens before the new ones in a phase that has none."""
        if context and not self.context:
            why = "begins with an empty cache" if self.serves else "has no cache"
            others = " and ".join(each.name for each in PHASES.values() if each.context)
            raise ValueError(
                f"phase {self.name} {why}; cached tokens (--context {context}) are for {others}"
            )

    def check_answer(self, tokens: int) -> None:
        """Raise ValueError for tokens of an answer in a phase that gives none."""
        if tokens and not self.answer:
            others = " and ".join(each.name for each in PHASES.values() if each.answer)
            raise ValueError(
                f"only phase {others} has output tokens (--output-tokens), not {self.name}"
            )


TRAIN = Phase("train", backward=True, run="step")
PREFILL = Phase("prefill", serves=True)
DECODE = Phase("decode", serves=True, needs_cache=True, tokens=1, context=8192)
APPEND = Phase("append", serves=True, needs_cache=True, context=8192)
SERVE = Phase(
    "serve", serves=True, needs_cache=True, answer=256, programs=(PREFILL.name, DECODE.name)
)

PHASES: dict[str, Phase] = {each.name: each for each in (TRAIN, PREFILL, DECODE, APPEND, SERVE)}


def find_phase(name: str) -> Phase:
    """The phase of that name; ValueError if there is none."""
    if name not in PHASES:
        raise ValueError(f"unknown phase `{name}`; expected one of {', '.join(PHASES)}")
    return PHASES[name]


def register(phase: Phase) -> None:
    """Add a phase, under a name that no other has."""
    if phase.name in PHASES:
        raise ValueError(f"there is a phase `{phase.name}` already")
    PHASES[phase.name] = phase
