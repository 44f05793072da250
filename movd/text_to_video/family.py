"""What a model family supplies, so that one pipeline makes its videos.

A family opens its checkpoints and knows its networks, its flows and its sizes; it holds no loop and writes
no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from blockstream.plugins import Flow, Network, Run
from movd.text_to_video.prompt_options import PromptOptions


class TextStage(NamedTuple):
    """One text encoder.

    `embed(module, text)` returns y [1, 1, L, C] and mask [1, L], whose first tokens are real; `about` is
    what an embedding follows from beside its text.
    """

    name: str
    network: Callable[[], Network]
    example: Any
    embed: Callable[[Any, str], tuple[Tensor, Tensor]]
    about: Mapping[str, Any]


#: What one text encoder says of one text.
Embedding = tuple[Tensor, Tensor]


class Leg(NamedTuple):
    """One flow of a prompt: its name among the prompt's, its steps, the shape of what it moves."""

    name: str
    steps: int
    shape: tuple[int, ...]


class Way(Protocol):
    """One prompt's way from noise to latents, flow after flow."""

    def begin(self, leg: int, before: Tensor | None) -> Tensor:
        """Return where a flow begins; `before` is what the one before it reached."""

    def flow(self, leg: int, on_remaining: Callable[[int], None]) -> Flow:
        """Return the flow of a leg; `on_remaining` is told how many velocities of it follow."""

    def end(self, leg: int, z: Tensor) -> None:
        """Take in what a flow has reached."""

    def latents(self) -> Tensor:
        """Return the latents [1, c, T, h, w], once every flow has ended."""

    def state(self) -> Mapping[str, Any]:
        """Return what a resumed run needs, between two flows, beside what the last one reached."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


class Family(Protocol):
    """A model family for one run's options. `open` comes first.

    `guidance_passes` is how many passes of the denoiser one velocity takes; `truncates`: samples become bytes
    by cutting, not by rounding; `has_reference`: the first frame is an image that is given.
    """

    options: PromptOptions
    guidance_passes: int
    truncates: bool
    has_reference: bool

    def open(self, run: Run) -> None:
        """Open the checkpoints: headers and configurations are read, nothing else."""

    def identity(self) -> Mapping[str, str | None]:
        """Return what tells the run's checkpoints and inputs from others, by name."""

    def pixels(self) -> tuple[int, int]:
        """Return height and width of the video."""

    def texts(self, n: int) -> Sequence[Sequence[str]]:
        """Return, for each text encoder, the texts that prompt `n` needs, its own first."""

    def remarks(self, n: int) -> Sequence[str]:
        """Return what is to be said of prompt `n` before it is read: what is cut, what is not known."""

    def encoders(self, run: Run) -> Sequence[TextStage]:
        """Return the text encoders, in the order they run."""

    def reference(self) -> tuple[Network, Tensor] | None:
        """Return what encodes the first frame, and the frame [1, 3, 1, H, W]; None where there is none.

        A forward returns latents [1, c, 1, h, w].
        """

    def denoiser(self, run: Run) -> Network:
        """Return the denoiser."""

    def denoiser_inputs(self) -> Mapping[str, Any]:
        """Return inputs of the largest pass."""

    def legs(self) -> Sequence[Leg]:
        """Return the flows of a prompt, in order: the same for every prompt."""

    def pace(self, network: Network, run: Run) -> Sequence[Sequence[float]]:
        """Return how long passes take beside that of `denoiser_inputs`, a row a leg; () if all alike."""

    def way(self, denoiser: nn.Module, texts: Sequence[Sequence[Embedding]], first: Tensor | None) -> Way:
        """Return the way of a prompt, its texts in the order of `texts`; `first` is the encoded frame."""

    def attention(
        self, denoiser: nn.Module, run: Run, texts: Sequence[Sequence[Embedding]]
    ) -> AbstractContextManager[object]:
        """Apply the run's attention transforms to the denoiser for the length of the block."""

    def decoder(self) -> Network:
        """Return the decoder."""

    def decoder_inputs(self) -> Any:
        """Return inputs of the largest pass of the decoder."""

    def decoder_passes(self) -> int:
        """Return how many passes of the decoder a video takes."""

    def clips(self, decoder: Any, z: Tensor) -> Iterator[Tensor]:
        """Yield the video [1, 3, t, H, W] in -1..1, part by part."""


class OneFlow:
    """The way of a family whose prompts take a single flow. Implements `Way`."""

    def __init__(self, z: Tensor, make: Callable[[Callable[[int], None]], Flow]) -> None:
        self._z, self._make = z, make

    def begin(self, leg: int, before: Tensor | None) -> Tensor:
        """Return the noise."""
        return self._z

    def flow(self, leg: int, on_remaining: Callable[[int], None]) -> Flow:
        """Return the flow."""
        return self._make(on_remaining)

    def end(self, leg: int, z: Tensor) -> None:
        """Take in the sample."""
        self._z = z

    def latents(self) -> Tensor:
        """Return the sample."""
        return self._z

    def state(self) -> Mapping[str, Any]:
        """Return nothing: there is no moment between flows."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from nothing."""
