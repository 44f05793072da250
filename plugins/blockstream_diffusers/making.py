"""One run of a pipeline of diffusers: its networks as stages, a call a prompt, files of what it returns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockstream.checkpoint import Checkpoint
from blockstream.checkpoint.read.locate import located
from blockstream.errors import BlockstreamError, ConfigError
from blockstream.plan.segments import Passes, Unknown
from blockstream.plugins import Run, entrypoints
from blockstream.streaming.pipeline import assemble
from blockstream.system import regular

from .adapters import load_lora
from .arguments import Arguments
from .options import Options
from .results import Result, floats_of, results_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockstream.streaming.session import Session

#: What a prompt's results are listed in, written last: a run that goes on makes what is not listed.
MADE = "made.json"
#: The small files of a folder that results follow from are at most so large.
MOST_SMALL_NBYTES = 64 << 20
_SMALL = (".json", ".txt", ".model", ".jinja")


class Diffusers:
    """One run. See `blockstream.plugins.Pipeline`."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def declare(self, session: Session, run: Run) -> None:
        """Build the pipeline, each network a stage; check every argument."""
        o = self.options
        self._refuse_others(run)
        self.folder = located(o.folder)
        self.left = [n for n in range(len(o.texts)) if not self._is_made(run, n)]
        run.files.declare([self._named(n, MADE) for n in range(len(o.texts))])
        run.files.identify(_small_files(self.folder))
        for lora in o.lora:
            if lora.path.is_file():
                run.files.identify({f"lora {lora.path.name}": _hash(lora.path)})
        if not self.left:
            return
        self.pipe = assemble(
            session, self.folder, o.dtype, o.variant, opened=self._opened(run), passes=self._passes
        )
        self.arguments = Arguments(self.pipe, o.call, o.texts != (None,))
        run.files.identify(self.arguments.identity())
        self._set_scheduler()
        if o.vae_tiling:
            if not hasattr(getattr(self.pipe, "vae", None), "enable_tiling"):
                raise ConfigError(
                    f"vae_tiling: {type(self.pipe).__name__} has no VAE with tiles; leave it out"
                )
            self.pipe.vae.enable_tiling()
        load_lora(self.pipe, o.lora)
        self.pipe.set_progress_bar_config(disable=True)

    def run(self, session: Session, run: Run) -> Mapping[str, Any]:
        """Make what is left, prompt by prompt; return the files."""
        for n in self.left:
            with run.phase(f"prompt {n}"):
                self._make(run, n)
        made = [self._made(run, n) for n in range(len(self.options.texts))]
        return {
            "files": [name for one in made for name in one["files"]],
            "prompts": [text for text in self.options.texts if text is not None],
            "seed": self.options.seed,
            "pipeline": made[0]["pipeline"],
            "said": [one["said"] for one in made],
        }

    # -- one prompt --------------------------------------------------------------------------

    def _make(self, run: Run, n: int) -> None:
        """Call the pipeline for one prompt; write what it returns."""
        made = self._call(n)
        for name, value in floats_of(made):
            run.check(f"{name} of prompt {n}", value)
        results, said = results_of(made)
        if not results:
            raise ConfigError(f"{type(self.pipe).__name__} returned nothing to write but {', '.join(made)}")
        names = [self._named(n, result.stem + result.suffix) for result in results]
        run.files.declare(names)
        for name, result in zip(names, results, strict=True):
            self._write(run, name, result)
        about = {"files": names, "pipeline": type(self.pipe).__name__, "said": said}
        run.files.write(self._named(n, MADE), json.dumps(about, indent=1).encode())

    def _call(self, n: int) -> Mapping[str, Any]:
        o, arguments = self.options, self.arguments
        values = arguments.values()
        if o.texts[n] is not None:
            values["prompt"] = o.texts[n]
        if arguments.takes("generator"):
            values["generator"] = torch.Generator().manual_seed(o.seed)
        if arguments.defaults.get("output_type") == "pil":
            values["output_type"] = "np"  # the same bytes, and what is not finite is seen
        torch.manual_seed(o.seed)  # for what draws numbers past its generator
        with _refusing(type(self.pipe).__name__):
            made = self.pipe(**values)
        if not isinstance(made, Mapping):
            raise ConfigError(f"{type(self.pipe).__name__} returns {type(made).__name__}, without names")
        return made

    def _write(self, run: Run, name: str, result: Result) -> None:
        with run.files.writing(name) as path:
            result.write(path, self.options.fps, _rate(self.pipe))

    def _named(self, n: int, name: str) -> str:
        return f"{n:04d}/{name}" if len(self.options.texts) > 1 else name

    def _is_made(self, run: Run, n: int) -> bool:
        """Return whether all that a prompt makes is there, byte for byte."""
        if not run.files.is_whole(self._named(n, MADE)):
            return False
        return all(run.files.is_whole(name) for name in self._made(run, n)["files"])

    def _made(self, run: Run, n: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            regular.read_text(run.out / self._named(n, MADE), MOST_SMALL_NBYTES)
        )
        return found

    # -- what it is made of ------------------------------------------------------------------

    def _opened(self, run: Run) -> Any:
        """Return what opens a network's folder: the run's backend, or the variant that is named."""
        variant = self.options.variant
        return run.checkpoint if variant is None else lambda path: Checkpoint.open(path, variant)

    def _passes(self, name: str) -> Passes:
        """Return how often a network is expected to run: the denoiser once a step, others once a prompt."""
        steps = self.options.call.get("num_inference_steps")
        denoises = name.startswith(("unet", "transformer", "prior", "controlnet"))
        return Unknown(len(self.left) * (steps if denoises and type(steps) is int and steps > 0 else 1))

    def _refuse_others(self, run: Run) -> None:
        """Refuse choices of the config that this pipeline has no use for."""
        if run.config.attention:
            raise ConfigError("diffusers takes no attention transforms; leave attention out")
        if (ref := run.config.sampler.ref) != "euler":
            raise ConfigError(
                f"sampler: {ref}: a pipeline of diffusers samples by its scheduler; leave sampler out, or "
                "write scheduler"
            )

    def _set_scheduler(self) -> None:
        wanted = self.options.scheduler
        if wanted is None:
            return
        import diffusers

        known = [x for x in dir(diffusers) if x.endswith("Scheduler")]
        if wanted.name not in known:
            raise ConfigError(
                f"scheduler: diffusers has no {wanted.name}{entrypoints.nearest(wanted.name, known)}"
            )
        kind = getattr(diffusers, wanted.name)
        known = list(kind._get_init_keys(kind))
        for key in wanted.settings:
            if key not in known:
                raise ConfigError(
                    f"scheduler.settings.{key}: {wanted.name} has no such setting"
                    f"{entrypoints.nearest(key, known)}"
                )
        self.pipe.scheduler = kind.from_config(self.pipe.scheduler.config, **wanted.settings)


@contextmanager
def _refusing(who: str) -> Iterator[None]:
    """Say what a pipeline says of its arguments as an error of the config."""
    try:
        yield
    except BlockstreamError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"call: {who} refuses: {' '.join(str(error).split())[:500]}") from error


def _rate(pipe: Any) -> int:
    """Return the samples a second of a pipeline's sound."""
    for part in ("vocoder", "audio_vae", "vae"):
        config = getattr(getattr(pipe, part, None), "config", {})
        for key in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            if isinstance(config, Mapping) and type(config.get(key)) is int:
                return int(config[key])
            if type(getattr(config, key, None)) is int:
                return int(getattr(config, key))
    return 16_000


def _small_files(folder: Path) -> dict[str, str]:
    """Return what tells the folder's small files (settings, tokenizers) from others; of a DDUF file, all."""
    if folder.is_file():
        return {"pipeline": _hash(folder)}
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _SMALL and p.is_file()):
        if not path.name.endswith(".index.json"):
            digest.update(f"{path.relative_to(folder)} {_hash(path)}".encode())
    return {"pipeline": digest.hexdigest()[:16]}


def _hash(path: Path) -> str:
    with regular.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
