"""Reading a Megatron V1 checkpoint folder, ours or the peer's, at any TP / PP / VPP, plain, unified or LoRA only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.config import Layout
from mindspeed_lora.weights.megatron_files import RANK_FILE_NAME, TRACKER_NAME, iteration_directory_name
from mindspeed_lora.weights.placement import block_ranks, expert_blocks, expert_tensor_size, listed_numbers, place_layers, stage_ranks
from mindspeed_lora.weights.torch_files import as_namespace, load_torch_file

_RANK_DIRECTORY = re.compile(r"^mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?$")
_LOCAL_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..*)$")
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GROUPED = re.compile(r"\.experts\.weight([12])(?:_lora_([ab]))?$")
_REOPEN_AFTER_BYTES = 1 << 27


def is_expert_name(name: str) -> bool:
    """Whether a tensor of a file belongs to routed experts, which are dealt out over ranks."""
    return _LOCAL_EXPERT.search(name) is not None or _GROUPED.search(name) is not None


def mapped_bytes_limit() -> int:
    """How many bytes of pages that were read stay mapped before a folder's files are closed; see :meth:`MegatronFolder.note_read`."""
    return _REOPEN_AFTER_BYTES


@dataclass
class RankFile:
    """One ``model_optim_rng.pt``, opened when first needed; ``iteration``: what the folder's first file says of itself."""

    path: Path
    iteration: object = None
    _content: dict[str, Any] | None = field(default=None, repr=False)

    def content(self) -> dict[str, Any]:
        """The dictionary, tensors memory-mapped.

        Raises:
            CheckpointError: the file is damaged, or of another iteration than the first.
        """
        if self._content is None:
            content = load_torch_file(self.path)
            found = content.get("iteration", self.iteration)
            if self.iteration is not None and found != self.iteration:
                raise CheckpointError(
                    f"{self.path}: is of iteration {found}, the folder's first file of {self.iteration}; "
                    "files of two saves are mixed, copy the whole folder again"
                )
            self._content = content
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


def _layer_numbers(file: RankFile, chunk: int) -> list[int]:
    """Numbers that layers have inside a chunk, ascending."""
    return sorted({int(match[2]) for name in file.names(chunk) if (match := _LOCAL_LAYER.match(name))})


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


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: stage, model chunk, name in the files; of a routed expert also its block and number in the block."""

    stage: int
    chunk: int
    name: str
    block: int | None = None
    expert: int = 0


def _check_one_form(path: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where base weights of experts lie one by one and grouped."""
    single, grouped = (
        next((name for name in sorted(names) if pattern.search(name) and "lora_" not in name), None)
        for pattern in (_LOCAL_EXPERT, _GROUPED)
    )
    if single and grouped:
        raise CheckpointError(
            f"{path}: experts one by one ({single}) and grouped ({grouped}, of --moe-grouped-gemm) are mixed; "
            "copy the whole folder of one save again"
        )


class MegatronFolder:
    """The files of one iteration, addressed by global layer and expert numbers."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._bytes_read = 0
        self.iteration_dir, self.iteration = find_iteration(self.path)
        folders = self._rank_folders()
        files = [RankFile(folder / RANK_FILE_NAME) for folder, _ in folders]
        first = next((file for file in files if file.path.is_file()), None)
        self.args: SimpleNamespace | None = as_namespace(first.content().get("args")) if first else None
        iteration = first.content().get("iteration") if first else None
        for file in files:
            file.iteration = iteration
        self._files = self._rank_files(folders, files)
        self.tp_size = 1 + max(tp for tp, _, _ in self._files)
        self.pp_size = 1 + max(pp for _, pp, _ in self._files)
        self.layout = self._layout()
        self._check_complete()
        self._tensor_ranks = [next(rank for rank in stage_ranks(self.layout) if rank[0] == tp) for tp in range(self.tp_size)]
        self.num_chunks = len(self.file(0, 0).chunks())
        self.places = self._place_layers()
        self.num_experts = self._count_experts()

    def _rank_folders(self) -> list[tuple[Path, list[int]]]:
        """Rank folders and the numbers in their names."""
        found = []
        for folder in sorted(self.iteration_dir.glob("mp_rank_*")):
            match = _RANK_DIRECTORY.match(folder.name)
            if match is None:
                raise CheckpointError(f"{folder}: not of the form mp_rank_TT, with the pipeline rank, the expert rank, or both behind it")
            found.append((folder, [int(number) for number in match.groups() if number is not None]))
        if not found:
            raise CheckpointError(f"{self.iteration_dir}: has no mp_rank_* folder")
        return found

    def _rank_files(self, folders: list[tuple[Path, list[int]]], files: list[RankFile]) -> dict[tuple[int, int, int], RankFile]:
        """Files by (tensor, pipeline, expert) rank; ``mp_rank_TT_NNN`` alone does not say which of the two NNN is, the args do."""
        expert_second = (getattr(self.args, "expert_model_parallel_size", None) or 1) > 1
        expert_second = expert_second and (getattr(self.args, "pipeline_model_parallel_size", None) or 1) == 1
        found = {}
        for (_, numbers), file in zip(folders, files, strict=True):
            tp_rank, *rest = numbers
            pp_rank, ep_rank = rest if len(rest) == 2 else ([0, *rest] if expert_second else [*rest, 0])[:2] if rest else (0, 0)
            found[tp_rank, pp_rank, ep_rank] = file
        return found

    def _layout(self) -> Layout:
        """Sizes as ``args`` and the folders say them; the larger where they differ, so that a missing folder is noticed."""

        def size(name: str, found: int) -> int:
            return max(getattr(self.args, name, None) or found, found)

        tp_size = size("tensor_model_parallel_size", self.tp_size)
        extends = bool(getattr(self.args, "moe_tp_extend_ep", False))
        has_experts = getattr(self.args, "num_experts", None)
        return Layout(
            tensor_parallel_size=tp_size,
            pipeline_parallel_size=size("pipeline_model_parallel_size", self.pp_size),
            noop_layers=tuple(sorted(listed_numbers(getattr(self.args, "noop_layers", None)))),
            expert_parallel_size=size("expert_model_parallel_size", 1 + max(ep for _, _, ep in self._files)),
            expert_tensor_parallel_size=getattr(self.args, "expert_tensor_parallel_size", None) if has_experts else None,
            experts_over_tensor_ranks=extends,
            grouped_gemm=bool(getattr(self.args, "moe_grouped_gemm", False)),
        )

    def _check_complete(self) -> None:
        """Every rank of the layout is there, as far as folders and ``args`` tell."""
        if getattr(self.args, "schedules_method", None) == "dualpipev":
            raise CheckpointError(f"{self.path}: written for the dualpipev schedule, whose layers lie in another order; not supported")
        layout = self.layout
        if expert_tensor_size(layout) not in (1, layout.tensor_parallel_size):
            raise CheckpointError(f"{self.path}: written with expert tensor parallel size {expert_tensor_size(layout)}; not supported")
        for tp_rank, ep_rank in stage_ranks(layout):
            for pp_rank in range(layout.pipeline_parallel_size):
                file = self._files.get((tp_rank, pp_rank, ep_rank))
                if file is None or not file.path.is_file():
                    where = (
                        f"tensor rank {tp_rank}, pipeline rank {pp_rank} of {layout.tensor_parallel_size} x {layout.pipeline_parallel_size}"
                    )
                    if layout.expert_parallel_size > 1:
                        where += f", expert rank {ep_rank} of {layout.expert_parallel_size}"
                    raise CheckpointError(f"{self.iteration_dir}: the file of {where} is missing; copy the whole folder again")

    def file(self, tp_rank: int, pp_rank: int, ep_rank: int | None = None) -> RankFile:
        """One rank's file; without ``ep_rank`` the first that holds this tensor rank's share of what is no expert."""
        return self._files[tp_rank, pp_rank, self._tensor_ranks[tp_rank][1] if ep_rank is None else ep_rank]

    def _place_layers(self) -> list[tuple[int, int, int]]:
        """Global layer -> (stage, chunk, local number): chunk by chunk, stage by stage."""
        if (planned := self._planned_places()) is not None:
            return planned
        places: list[tuple[int, int, int]] = []
        gaps_allowed = bool(self.layout.noop_layers)
        for chunk in range(self.num_chunks):
            for stage in range(self.pp_size):
                file = self.file(0, stage)
                if len(file.chunks()) != self.num_chunks:
                    raise CheckpointError(f"{file.path}: has {len(file.chunks())} model chunks, the first stage has {self.num_chunks}")
                numbers = _layer_numbers(file, chunk)
                if numbers != list(range(len(numbers))) and not gaps_allowed:
                    missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
                    raise CheckpointError(f"{file.path}: layer {missing} is missing between layers {numbers[0]} and {numbers[-1]}")
                places.extend((stage, chunk, number) for number in numbers)
        return places

    def _planned_places(self) -> list[tuple[int, int, int]] | None:
        """Where the layers of a LoRA-only save lie by its ``args``, for it need not adapt every layer; None: they do not tell."""
        slots, noops = getattr(self.args, "num_layers", None), self.layout.noop_layers
        if any("lora_" not in name for name in self.file(0, 0).names(0)) or not isinstance(slots, int):
            return None
        layout = Layout(
            pipeline_parallel_size=self.pp_size,
            layers_per_virtual_stage=slots // (self.pp_size * self.num_chunks) if self.num_chunks > 1 else None,
            num_layer_list=listed_numbers(getattr(self.args, "num_layer_list", None)) or None,
            noop_layers=noops,
        )
        try:
            stages = place_layers(slots - len(noops), layout)
        except UsageError:
            return None
        order = [(stage, chunk) for chunk in range(self.num_chunks) for stage in range(self.pp_size)]
        planned = [(stage, chunk, local) for stage, chunk in order for local, _ in stages[stage][chunk]]
        found = {
            (stage, chunk, number)
            for stage in range(self.pp_size)
            for chunk in range(len(self.file(0, stage).chunks()))
            for number in _layer_numbers(self.file(0, stage), chunk)
        }
        return planned if found <= set(planned) else None

    @property
    def num_layers(self) -> int:
        """Layers over all stages."""
        return len(self.places)

    @property
    def grouped(self) -> bool:
        """Whether the routed experts of a rank lie in one tensor."""
        return any(_GROUPED.search(name) for stage in range(self.pp_size) for name in self.file(0, stage).names(0))

    def _count_experts(self) -> int:
        """Routed experts of the model: the rows of a router, or what ``args`` say, or what the files hold."""
        blocks, local = expert_blocks(self.layout), 0
        for stage in range(self.pp_size):
            for chunk in range(self.num_chunks):
                for name in self.file(0, stage).names(chunk):
                    if name.endswith(".mlp.router.weight"):
                        return int(self.file(0, stage).tensor(chunk, name).shape[0])
                    match = _LOCAL_EXPERT.search(name)
                    local = max(local, int(match[1]) + 1) if match else local
        return local * blocks or int(getattr(self.args, "num_experts", None) or 0)

    def _expert_names(self, name: str, block: int) -> list[tuple[str, int]]:
        """(name with the expert's global number, number in its block) of every logical tensor that a file's tensor holds."""
        size = max(self.num_experts // expert_blocks(self.layout), 1)
        match = _LOCAL_EXPERT.search(name)
        if match:
            local = int(match[1])
            return [(name.replace(match[0], f".local_experts.{block * size + local}."), local)]
        match = _GROUPED.search(name)
        assert match is not None
        linear = f"linear_fc{match[1]}." + {None: "weight", "a": "lora_A.default.weight", "b": "lora_B.default.weight"}[match[2]]
        stem = name[: match.start()] + ".experts.local_experts."
        return [(f"{stem}{block * size + local}.{linear}", local) for local in range(size)]

    def global_names(self) -> Iterator[tuple[str, Place]]:
        """(name with global numbers and without ``base_layer``, place) of every tensor."""
        numbers = {place: layer for layer, place in enumerate(self.places)}
        for stage in range(self.pp_size):
            for chunk in range(self.num_chunks):

                def plain(name: str, stage: int = stage, chunk: int = chunk) -> str:
                    match = _LOCAL_LAYER.match(name)
                    if match is None:
                        return name.replace(".base_layer.", ".")
                    layer = numbers.get((stage, chunk, int(match[2])), -1)
                    return f"{match[1]}{layer}{match[3]}".replace(".base_layer.", ".")

                names = self.file(0, stage).names(chunk)
                yield from ((plain(name), Place(stage, chunk, name)) for name in names if not is_expert_name(name))
                if not any(is_expert_name(name) for name in names):
                    continue
                for block in range(expert_blocks(self.layout)):
                    tp_rank, ep_rank = block_ranks(self.layout, block)[0]
                    for name in self.file(tp_rank, stage, ep_rank).names(chunk):
                        if is_expert_name(name):
                            for found, local in self._expert_names(plain(name), block):
                                yield found, Place(stage, chunk, name, block, local)

    def index(self) -> dict[str, list[Place]]:
        """Global name -> where it lies; a tied head lies on the last stage only, other names once."""
        found: dict[str, list[Place]] = {}
        for name, place in self.global_names():
            found.setdefault(name, []).append(place)
        return found

    def check_equal_names(self) -> None:
        """Every rank of a stage holds the same names, and experts in one form.

        Raises:
            CheckpointError: one does not.
        """
        for stage in range(self.pp_size):
            for chunk in range(self.num_chunks):
                expected = set(self.file(0, stage).names(chunk))
                _check_one_form(self.file(0, stage).path, expected)
                for tp_rank, ep_rank in stage_ranks(self.layout)[1:]:
                    file = self.file(tp_rank, stage, ep_rank)
                    odd = sorted(expected ^ set(file.names(chunk)))
                    if odd:
                        _check_one_form(file.path, odd)
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

    def shards(self, place: Place) -> list[torch.Tensor]:
        """All shards of one tensor (mapped views): of every tensor rank; of an expert, of the ranks that share it."""
        if place.block is None:
            return [self.file(tp_rank, place.stage).tensor(place.chunk, place.name) for tp_rank in range(self.tp_size)]
        files = [self.file(tp_rank, place.stage, ep_rank) for tp_rank, ep_rank in block_ranks(self.layout, place.block)]
        tensors = [file.tensor(place.chunk, place.name) for file in files]
        grouped = _GROUPED.search(place.name)
        return [self._of_group(tensor, grouped[1], place) for tensor in tensors] if grouped else tensors

    def _of_group(self, tensor: torch.Tensor, linear: str, place: Place) -> torch.Tensor:
        """One expert's share of a grouped-gemm tensor, as a linear layer's weight ``[out, in]`` (a view)."""
        count = self.num_experts // expert_blocks(self.layout)
        try:
            stacked = tensor.view(count, tensor.shape[0], -1) if linear == "1" else tensor.view(count, -1, tensor.shape[1])
        except (RuntimeError, IndexError) as error:
            raise CheckpointError(f"{self.path}: {place.name} of {list(tensor.shape)} does not hold {count} experts") from error
        return stacked[place.expert].T
