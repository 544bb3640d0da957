"""Every wrong input of convert_ckpt: one message, and nothing left on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import run_convert
from helpers import golden, tiny_llama, tiny_qwen3
from peft_helpers import make_adapter
from safetensors.torch import load_file, save_file

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.configs import LORA_TARGETS, LoraFlags
from mindspeed_lora.errors import CheckpointError, UsageError


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_qwen3(tmp_path / "hf")


USAGE: list[tuple[dict[str, Any], str]] = [
    (dict(target_tensor_parallel_size=3), "tensor parallel size 3 does not divide the model's num_query_groups 4; use one of [1, 2, 4]"),
    (dict(target_pipeline_parallel_size=3), "does not divide the model's 4 layers"),
    (dict(target_pipeline_parallel_size=2, layers_per_virtual_stage=3), "does not divide the 2 layers of a stage"),
    (dict(target_tensor_parallel_size=0), "must be at least 1"),
    (dict(make_vocab_size_divisible_by=0), "--make-vocab-size-divisible-by 0"),
    (dict(model_type_hf="llama2"), "--model-type-hf llama2 does not fit config.json"),
    (dict(params_dtype="int8"), "--params-dtype int8 is unknown"),
    (dict(add_qkv_bias=True), "has no qkv bias"),
    (dict(lora=LoraFlags(8, 16.0, LORA_TARGETS)), "name the adapter with --lora-load"),
    (dict(save_lora_to_hf=True), "needs --save-model-type hf"),
]


@pytest.mark.parametrize(("options", "message"), USAGE)
def test_flags_that_do_not_fit(hf: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        run_convert("hf", "mg", hf, tmp_path / "new/mg", **options)
    assert message in str(error.value) and error.value.exit_code == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["tensor", "pipeline"])
def test_a_hugging_face_folder_is_not_cut(hf: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(UsageError, match=f"--target-{flag}-parallel-size 2 with --save-model-type hf"):
        run_convert("mg", "hf", hf, tmp_path / "out", **{f"target_{flag}_parallel_size": 2})
    with pytest.raises(UsageError, match="--load-model-type xx is unknown"):
        run_convert("xx", "hf", hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_the_wrong_kind(hf: Path, tmp_path: Path) -> None:
    run_convert("hf", "mg", hf, tmp_path / "mg")
    with pytest.raises(CheckpointError, match="use --load-model-type hf"):
        run_convert("mg", "hf", hf, tmp_path / "out")
    with pytest.raises(CheckpointError, match="use --load-model-type mg"):
        run_convert("hf", "mg", tmp_path / "mg", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such folder"):
        run_convert("hf", "mg", tmp_path / "absent", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such folder"):
        run_convert("hf", "hf", hf, tmp_path / "out", lora_load=tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        run_convert("mg", "hf", tmp_path / "mg", tmp_path / "out", hf_cfg_dir=tmp_path / "absent")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(hf: Path, tmp_path: Path) -> None:
    run_convert("hf", "mg", hf, tmp_path / "mg")
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    for load, save, source, target in (("hf", "mg", hf, tmp_path / "mg"), ("hf", "mg", hf, hf)):
        with pytest.raises(CheckpointError, match="nothing is overwritten"):
            run_convert(load, save, source, target)
    assert before == {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    run_convert("mg", "hf", tmp_path / "mg", hf)
    assert (hf / "mg2hg/config.json").is_file(), "a folder with a model keeps it"
    with pytest.raises(CheckpointError, match="mg2hg: already holds"):
        run_convert("mg", "hf", tmp_path / "mg", hf)


def test_a_tokenizer_that_lies_in_the_target_is_not_replaced(hf: Path, tmp_path: Path) -> None:
    (hf / "tokenizer.json").write_text("{}")
    (tmp_path / "mg").mkdir()
    (tmp_path / "mg/tokenizer.json").write_text('{"mine": 1}')
    with pytest.raises(CheckpointError, match=r"already holds another tokenizer\.json"):
        run_convert("hf", "mg", hf, tmp_path / "mg")
    assert [path.name for path in (tmp_path / "mg").iterdir()] == ["tokenizer.json"]
    (tmp_path / "mg/tokenizer.json").write_text("{}")
    run_convert("hf", "mg", hf, tmp_path / "mg")


def test_without_config_json_the_rope_is_unknown(tmp_path: Path) -> None:
    source = golden() / "v1_qwen3_tp2pp2/output/mg"
    for save in ("hf", "mg"):
        with pytest.raises(CheckpointError, match="do not hold the rotary base"):
            run_convert("mg", save, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run_convert("mg", "mg", source, tmp_path / "mg", hf_cfg_dir=golden() / "v1_qwen3_tp2pp2/input/hf")
    assert (tmp_path / "mg/config.json").is_file()


def test_two_configurations_must_describe_one_model(hf: Path, tmp_path: Path) -> None:
    run_convert("hf", "mg", hf, tmp_path / "mg")
    other = tmp_path / "other"
    other.mkdir()
    values = json.loads((hf / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"norm_epsilon 0\.001.*describe different models"):
        run_convert("mg", "hf", tmp_path / "mg", tmp_path / "out", hf_cfg_dir=other)
    shutil.copyfile(tiny_llama(tmp_path / "llama") / "config.json", tmp_path / "mg/config.json")
    with pytest.raises(CheckpointError, match="unknown to this model's weight table"):
        run_convert("mg", "hf", tmp_path / "mg", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_in_the_middle_leaves_nothing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspeed_lora.conversion.stream import WeightStream

    original, calls = WeightStream.blocks, []

    def failing(self: WeightStream, row: Any, *rest: Any) -> Iterator[torch.Tensor]:
        calls.append(row)
        if len(calls) == 20:
            raise CheckpointError("the disk went away")
        return original(self, row, *rest)

    monkeypatch.setattr(WeightStream, "blocks", failing)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes.txt").write_text("mine")
    for save, target in (("mg", tmp_path / "a/b/out"), ("hf", tmp_path / "a/out"), ("mg", tmp_path / "kept")):
        calls.clear()
        with pytest.raises(CheckpointError, match="went away"):
            run_convert("hf", save, hf, target)
    assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("save", ["mg", "hf"])
def test_a_failure_between_the_renames_takes_back_what_had_moved(
    save: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, moved = Path.replace, []

    def failing(self: Path, target: Path) -> Path:
        if self.parent.name.startswith(".convert") and not target.parent.name.startswith(".convert"):
            moved.append(self)
            if len(moved) == 3:
                raise OSError(5, "Input/output error")
        return original(self, target)

    (tmp_path / "kept").mkdir()
    shutil.copyfile(hf / "config.json", tmp_path / "kept/config.json")
    monkeypatch.setattr(Path, "replace", failing)
    for target in (tmp_path / "a/out", tmp_path / "kept"):
        moved.clear()
        with pytest.raises(CheckpointError, match=r"Input/output error.*nothing of it is left"):
            run_convert("hf", save, hf, target)
    assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "kept").iterdir() if path.name != "mg2hg"] == ["config.json"]
    assert not (tmp_path / "kept/mg2hg").exists()


@pytest.mark.parametrize("save", ["mg", "hf", "peft"])
def test_a_full_disk_is_one_message_and_leaves_nothing(save: str, tmp_path: Path, capsys: Any) -> None:
    """Files of at most some bytes: the kernel refuses the rest of a write, as a full disk does."""
    import resource
    import signal

    hf = tiny_qwen3(tmp_path / "hf")
    argv = ["--load-model-type", "hf", "--save-model-type", save, "--load-dir", str(hf), "--save-dir", str(tmp_path / "a/out")]
    if save == "peft":
        make_adapter(hf, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
        argv = ["--load-model-type", "hf", "--save-model-type", "hf", "--load-dir", str(tmp_path / "adapter"), "--hf-cfg-dir", str(hf)]
        argv += ["--save-lora-to-hf", "--save-dir", str(tmp_path / "a/out")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = main("convert_ckpt.py", argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    errors = capsys.readouterr().err
    assert code == 1 and errors.count("error: --save-dir") == 1 and "Traceback" not in errors and "cannot be written" in errors, errors
    assert not (tmp_path / "a").exists()


def test_verify_reads_every_part(hf: Path, tmp_path: Path) -> None:
    run_convert("hf", "mg", hf, tmp_path / "mg")
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "first")
    tensors = load_file(tmp_path / "first/model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "first/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*"):
        run_convert("hf", "mg", tmp_path / "first", tmp_path / "again", verify=True)
    assert not (tmp_path / "again").exists()


def test_links_are_followed_and_only_contents_are_copied(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/x").write_text('{"a": 1}')
    (hf / "tokenizer.json").symlink_to(tmp_path / "blobs/x")
    (hf / "modeling_evil.py").write_text("raise SystemExit")
    (hf / "merges.txt").symlink_to(tmp_path / "absent")
    run_convert("hf", "mg", hf, tmp_path / "mg")
    assert not (tmp_path / "mg/tokenizer.json").is_symlink() and (tmp_path / "mg/tokenizer.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "mg/modeling_evil.py").exists() and not (tmp_path / "mg/merges.txt").exists()


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (float("-inf"), None), (1e30, "fp16")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, dtype: str | None, name: str, tmp_path: Path) -> None:
    hf = tiny_qwen3(tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    for save in ("mg", "hf"):
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            run_convert("hf", save, hf, tmp_path / "out", params_dtype=dtype)
        assert not (tmp_path / "out").exists()
