"""Reading a Megatron V1 checkpoint folder, ours or the peer's, at any TP / PP / VPP, plain, unified or LoRA only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.megatron_files import RANK_FILE_NAME, TRACKER_NAME, iteration_directory_name
from mindspeed_lora.weights.torch_files import as_namespace, load_torch_file

_RANK_DIRECTORY = re.compile(r"^mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?$")
_LOCAL_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..*)$")
_REOPEN_AFTER_BYTES = 1 << 28


@dataclass
class RankFile:
    """One ``model_optim_rng.pt``, opened when first needed."""

    path: Path
    _content: dict[str, Any] | None = field(default=None, repr=False)

    def content(self) -> dict[str, Any]:
        """The dictionary, tensors memory-mapped."""
        if self._content is None:
            self._content = load_torch_file(self.path)
        return self._content

    def chunks(self) -> list[str]:
        """``["model"]`` or ``["model0", ...]``.

        Raises:
            CheckpointError: the file has no model.
        """
        names = [key for key in self.content() if re.fullmatch(r"model\d*", key)]
        if not names:
            raise CheckpointError(f"{self.path}: has no key 'model'; keys are {sorted(map(str, self.content()))}")
        return sorted(names, key=lambda name: int(name.removeprefix("model") or 0))

    def names(self, chunk: int) -> list[str]:
        """Keys of one model chunk that hold tensors."""
        model = self.content()[self.chunks()[chunk]]
        if not isinstance(model, dict):
            raise CheckpointError(f"{self.path}: its model is {type(model).__name__}, expected a dictionary")
        return [name for name, value in model.items() if isinstance(value, torch.Tensor)]

    def tensor(self, chunk: int, name: str) -> torch.Tensor:
        """One tensor, a view of the mapped file; copy before changing it."""
        tensor = self.content()[self.chunks()[chunk]].get(name)
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        return tensor

    def close(self) -> None:
        """Drop the mapping; tensors handed out keep theirs as long as they live."""
        self._content = None


def find_iteration(folder: Path) -> tuple[Path, int]:
    """(iteration folder, iteration) that the tracker names; the folder itself may be an iteration folder.

    Raises:
        CheckpointError: no tracker, an unreadable one, or one that names a missing folder.
    """
    folder = Path(folder)
    tracker = folder / TRACKER_NAME
    if not tracker.is_file():
        number = re.fullmatch(r"iter_(\d{7})", folder.name)
        if number and any(folder.glob("mp_rank_*")):
            return folder, int(number[1])
        raise CheckpointError(f"{folder}: no {TRACKER_NAME}; a Megatron checkpoint folder has one, written when the save was complete")
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not text.isdigit():
        raise CheckpointError(f"{tracker}: says {text[:40]!r}, expected an iteration number or 'release'")
    iteration = 0 if text == "release" else int(text)
    target = folder / (text if text == "release" else iteration_directory_name(iteration))
    if not target.is_dir():
        raise CheckpointError(f"{target}: missing, though {tracker.name} names it; the checkpoint is incomplete")
    return target, iteration


def is_megatron_folder(folder: Path) -> bool:
    """Whether a folder looks like a Megatron checkpoint."""
    return (Path(folder) / TRACKER_NAME).is_file() or any(Path(folder).glob("mp_rank_*"))


class MegatronFolder:
    """The files of one iteration, addressed by global layer numbers."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._bytes_read = 0
        self.iteration_dir, self.iteration = find_iteration(self.path)
        self._files = self._find_files()
        self.tp_size = 1 + max(tp for tp, _ in self._files)
        self.pp_size = 1 + max(pp for _, pp in self._files)
        first = self._files.get((0, 0))
        self.args: SimpleNamespace | None = as_namespace(first.content().get("args")) if first else None
        self._check_complete()
        self.num_chunks = len(self.file(0, 0).chunks())
        self.places = self._place_layers()

    def _find_files(self) -> dict[tuple[int, int], RankFile]:
        files: dict[tuple[int, int], RankFile] = {}
        for folder in sorted(self.iteration_dir.glob("mp_rank_*")):
            match = _RANK_DIRECTORY.match(folder.name)
            if match is None or match[3] is not None:
                raise CheckpointError(
                    f"{folder}: not of the form mp_rank_TT or mp_rank_TT_PPP; expert-parallel checkpoints are not supported"
                )
            files[int(match[1]), int(match[2] or 0)] = RankFile(folder / RANK_FILE_NAME)
        if not files:
            raise CheckpointError(f"{self.iteration_dir}: has no mp_rank_* folder")
        return files

    def _check_complete(self) -> None:
        """Every rank of the layout is there, as far as folders and ``args`` tell."""
        args = self.args or SimpleNamespace()
        if getattr(args, "expert_model_parallel_size", 1) not in (1, None):
            raise CheckpointError(f"{self.path}: written with expert parallel size {args.expert_model_parallel_size}; not supported")
        if getattr(args, "schedules_method", None) == "dualpipev":
            raise CheckpointError(f"{self.path}: written for the dualpipev schedule, whose layers lie in another order; not supported")
        tp_size = getattr(args, "tensor_model_parallel_size", None) or self.tp_size
        pp_size = getattr(args, "pipeline_model_parallel_size", None) or self.pp_size
        for tp_rank in range(max(tp_size, self.tp_size)):
            for pp_rank in range(max(pp_size, self.pp_size)):
                file = self._files.get((tp_rank, pp_rank))
                if file is None or not file.path.is_file():
                    where = f"tensor rank {tp_rank}, pipeline rank {pp_rank} of {tp_size} x {pp_size}"
                    raise CheckpointError(f"{self.iteration_dir}: the file of {where} is missing; copy the whole folder again")

    def file(self, tp_rank: int, pp_rank: int) -> RankFile:
        """One rank's file."""
        return self._files[tp_rank, pp_rank]

    def _place_layers(self) -> list[tuple[int, int, int]]:
        """Global layer -> (stage, chunk, local number): chunk by chunk, stage by stage."""
        places: list[tuple[int, int, int]] = []
        gaps_allowed = bool(getattr(self.args, "noop_layers", None))
        for chunk in range(self.num_chunks):
            for stage in range(self.pp_size):
                file = self.file(0, stage)
                if len(file.chunks()) != self.num_chunks:
                    raise CheckpointError(f"{file.path}: has {len(file.chunks())} model chunks, the first stage has {self.num_chunks}")
                matches = [_LOCAL_LAYER.match(name) for name in file.names(chunk)]
                numbers = sorted({int(match[2]) for match in matches if match})
                if numbers != list(range(len(numbers))) and not gaps_allowed:
                    missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
                    raise CheckpointError(f"{file.path}: layer {missing} is missing between layers {numbers[0]} and {numbers[-1]}")
                places.extend((stage, chunk, number) for number in numbers)
        return places

    @property
    def num_layers(self) -> int:
        """Layers over all stages."""
        return len(self.places)

    def global_names(self) -> Iterator[tuple[str, int, int, str]]:
        """(name with the global layer number and without ``base_layer``, stage, chunk, name in the file) of every tensor."""
        numbers = {place: layer for layer, place in enumerate(self.places)}
        for stage in range(self.pp_size):
            for chunk in range(self.num_chunks):
                for name in self.file(0, stage).names(chunk):
                    match = _LOCAL_LAYER.match(name)
                    plain = name.replace(".base_layer.", ".")
                    if match:
                        layer = numbers[stage, chunk, int(match[2])]
                        plain = _LOCAL_LAYER.sub(rf"\g<1>{layer}\g<3>", plain)
                    yield plain, stage, chunk, name

    def index(self) -> dict[str, list[tuple[int, int, str]]]:
        """Global name -> where it lies; a tied head lies on the last stage only, other names once."""
        found: dict[str, list[tuple[int, int, str]]] = {}
        for plain, stage, chunk, name in self.global_names():
            found.setdefault(plain, []).append((stage, chunk, name))
        return found

    def check_equal_names(self) -> None:
        """Every tensor rank of a stage holds the same names.

        Raises:
            CheckpointError: one does not.
        """
        for stage in range(self.pp_size):
            for chunk in range(self.num_chunks):
                expected = set(self.file(0, stage).names(chunk))
                for tp_rank in range(1, self.tp_size):
                    file = self.file(tp_rank, stage)
                    odd = sorted(expected ^ set(file.names(chunk)))
                    if odd:
                        raise CheckpointError(f"{file.path}: its tensors differ from tensor rank 0's: {', '.join(odd[:5])}")

    def note_read(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say that ``tensors`` are about to be read whole.

        A mapping that stays open keeps every page it has read in the process's resident size, so after each
        ``_REOPEN_AFTER_BYTES`` over all files they are closed, to be opened again when next needed.
        """
        self._bytes_read += sum(tensor.nbytes for tensor in tensors)
        if self._bytes_read > _REOPEN_AFTER_BYTES:
            self._bytes_read = 0
            for file in self._files.values():
                file.close()

    def shards(self, place: tuple[int, int, str]) -> list[torch.Tensor]:
        """All tensor ranks' shards of one tensor (mapped views)."""
        stage, chunk, name = place
        return [self.file(tp_rank, stage).tensor(chunk, name) for tp_rank in range(self.tp_size)]
