"""Against the peer's own output, both ways; and streaming."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conversion_helpers import assert_same_tensors, load_folder, run_convert
from helpers import golden, shared_data, tiny_llama, tiny_qwen3
from safetensors.torch import load_file

from mindspeed_lora.arguments.configs import LORA_TARGETS, LoraFlags
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.arguments.v2 import v2_arguments
from mindspeed_lora.conversion.megatron_to_hf import write_hugging_face
from mindspeed_lora.conversion.run import convert
from mindspeed_lora.errors import UsageError
from mindspeed_lora.manifest import read_manifest, verify_parts
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable
from mindspeed_lora.weights.torch_files import load_torch_file

CASES = (
    "v1_qwen3_tp2pp2",
    "v1_llama3_tp2pp2",
    "v1_qwen3_tp2pp1",
    "v1_qwen3_tp2pp2_vpp1",
    "v1_qwen3_tp1pp2_list13",
    "v1_qwen25tied_tp2pp2",
    "v1_qwen25tied_tp2pp1_vocabpad128",
    "v1_qwen3moe_tp2pp1ep2_gemm",
    "v1_mixtral_tp2pp1ep2",
)
V2_CASES = ("v2_qwen3_tp2pp2", "v2_deepseek3_tp1pp1")
# Values of args where the peer stores its own defaults, or what is of no meaning here.
OTHER_ARGS = {"rotary_base", "attention_dropout", "hidden_dropout", "tokenizer_type", "make_vocab_size_divisible_by"}


def run_command(line: str, case: str, output: Path) -> None:
    """Run a line of a case's cmd.txt; its output/ lies below ``output``."""
    _, program, *words = line.split()
    names = {"input": golden() / case / "input", "output": output}
    argv = [str(names[word.split("/")[0]] / word.partition("/")[2]) if word.startswith(("input/", "output/")) else word for word in words]
    config, _ = parse("convert_ckpt.py", v2_arguments(argv) if program == "convert_ckpt_v2.py" else argv)
    convert(config)


def commands(case: str) -> list[str]:
    return [line for line in (golden() / case / "cmd.txt").read_text().splitlines() if line.startswith("python ")]


def convert_case(case: str, output: Path) -> Path:
    run_command(commands(case)[0], case, output)
    return output / "mg"


@pytest.mark.parametrize("case", CASES)
def test_hf_to_megatron_writes_what_the_peer_writes(case: str, tmp_path: Path) -> None:
    ours, theirs = convert_case(case, tmp_path), golden() / case / "output/mg"
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.pt"))
    assert files == sorted(path.relative_to(ours) for path in ours.rglob("*.pt"))
    assert (ours / "latest_checkpointed_iteration.txt").read_bytes() == (theirs / "latest_checkpointed_iteration.txt").read_bytes()
    for file in files:
        found, expected = load_torch_file(ours / file), load_torch_file(theirs / file)
        assert list(found) == list(expected), "top-level keys, in order"
        for key, value in expected.items():
            if key.startswith("model"):
                assert type(found[key]) is type(value) and list(found[key]) == list(value), "names, in order"
                for name, tensor in value.items():
                    same = tensor is None if found[key][name] is None else tensor.dtype == found[key][name].dtype
                    assert same and (tensor is None or torch.equal(found[key][name], tensor)), name
            elif key != "args":
                assert found[key] == value
        args, peer_args = vars(found["args"]), vars(expected["args"])
        assert {name for name in args if args[name] != peer_args[name]} <= OTHER_ARGS
        with zipfile.ZipFile(ours / file) as archive:
            assert archive.testzip() is None, "every record's CRC32 is right"
        assert type(torch.load(ours / file, weights_only=False)["args"]).__name__ == "Namespace"


@pytest.mark.parametrize("case", [*CASES, *V2_CASES])
def test_megatron_to_hf_gives_back_the_model(case: str, tmp_path: Path) -> None:
    source = golden() / case / "input/hf"
    run_convert("mg", "hf", golden() / case / "output/mg", tmp_path / "hf", hf_cfg_dir=source)
    assert_same_tensors(tmp_path / "hf", source)
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("case", V2_CASES)
def test_the_v2_converter_s_commands_write_the_same_tensors_and_give_the_model_back(case: str, tmp_path: Path) -> None:
    for line in commands(case):
        run_command(line, case, tmp_path)
    theirs = golden() / case / "output/mg"
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.pt"))
    assert files == sorted(path.relative_to(tmp_path / "mg") for path in (tmp_path / "mg").rglob("*.pt"))
    for file in files:
        found, expected = (load_torch_file(folder / file)["model"] for folder in (tmp_path / "mg", theirs))
        assert {name for name, value in found.items() if value is not None} == set(expected)
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype and torch.equal(found[name], tensor), name
    assert_same_tensors(tmp_path / "hf_back", golden() / case / "input/hf")


def test_unzip_finds_no_error(tmp_path: Path) -> None:
    if shutil.which("unzip") is None:
        pytest.skip("no unzip on this machine")
    for file in convert_case("v1_qwen3_tp2pp2", tmp_path).rglob("*.pt"):
        assert subprocess.run(["unzip", "-tq", str(file)], capture_output=True, check=False).returncode == 0


def test_merging_the_peer_s_adapter(tmp_path: Path) -> None:
    case = golden() / "v1lora_qwen3_tp2pp2_filter"
    save_dir = Path(shutil.copytree(case / "input/hf_savedir_before", tmp_path / "hf"))
    lora = LoraFlags(8, 16.0, LORA_TARGETS)
    run_convert("mg", "hf", case / "input/mg", save_dir, model_type_hf="qwen3", lora_load=case / "input/lora", lora=lora)
    merged, theirs = load_folder(save_dir / "mg2hg"), load_file(case / "output/mg2hf/model.safetensors")
    assert set(merged) == set(theirs)
    assert max(float((merged[name].float() - theirs[name].float()).abs().max()) for name in theirs) <= 5e-3
    base, adapter = open_base(case / "input/mg"), open_adapter(case / "input/lora")
    table = WeightTable(open_base(save_dir / "mg2hg").model_config)
    for row, layer in table.entries():
        for index, (name, weight) in enumerate(zip(row.hf_names(layer), base.parts(row, layer), strict=True)):
            if row.module is not None:
                matrix_a, matrices_b = adapter.lora_parts(row, layer)
                weight = (weight.float() + 16 / 8 * (matrices_b[index].float() @ matrix_a.float())).to(weight.dtype)
            assert torch.equal(merged[name], weight), f"{name}: not fp32 arithmetic cast once"


def test_merging_a_unified_checkpoint_of_the_peer(tmp_path: Path) -> None:
    case = golden() / "v1lora_qwen3_tp1pp1_unified"
    save_dir = Path(shutil.copytree(case / "input/hf_savedir_before", tmp_path / "hf"))
    run_convert("mg", "hf", case / "input/lora", save_dir, lora=LoraFlags(8, 16.0, LORA_TARGETS))
    merged, theirs = load_folder(save_dir / "mg2hg"), load_file(case / "output/mg2hf/model.safetensors")
    assert set(merged) == set(theirs)
    assert max(float((merged[name].float() - theirs[name].float()).abs().max()) for name in theirs) <= 5e-3


def test_a_unified_checkpoint_whose_args_name_no_targets_needs_the_three_flags(tmp_path: Path) -> None:
    """The peer's converter writes args with an empty target list: its r and alpha are then only defaults."""
    case = golden() / "v1lora_qwen3_tp1pp1_unified"
    folder, before = Path(shutil.copytree(case / "input/lora", tmp_path / "lora")), case / "input/hf_savedir_before"
    (file,) = folder.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    content = load_torch_file(file)
    args = argparse.Namespace(**{**vars(content["args"]), "lora_target_modules": [], "params_dtype": None, "lora_r": 16, "lora_alpha": 32})
    plain = {name: value for name, value in vars(args).items() if value is None or isinstance(value, bool | int | float | str | list)}
    torch.save({**content, "args": argparse.Namespace(**plain)}, tmp_path / "changed")
    (tmp_path / "changed").replace(file)
    assert open_adapter(folder).lora is None
    with pytest.raises(UsageError, match="does not record r, alpha and targets; pass --lora-r, --lora-alpha and --lora-target-modules"):
        run_convert("mg", "hf", folder, tmp_path / "none", hf_cfg_dir=before)
    for source, target in ((case / "input/lora", "recorded"), (folder, "passed")):
        run_convert("mg", "hf", source, tmp_path / target, hf_cfg_dir=before, lora=LoraFlags(8, 16.0, LORA_TARGETS))
    assert_same_tensors(tmp_path / "recorded", tmp_path / "passed")


def test_exporting_the_peer_s_adapter_where_the_peer_is_wrong_at_tensor_parallel_2(tmp_path: Path) -> None:
    case = golden() / "v1lora_qwen3_tp2pp2_savelorahf"
    save_dir = Path(shutil.copytree(case / "input/hf_savedir_before", tmp_path / "hf"))
    run_convert("mg", "hf", case / "input/lora", save_dir, save_lora_to_hf=True)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (save_dir / "mg2hg", case / "output/mg2hf"))
    assert set(ours) == set(theirs)
    for name in theirs:
        if name.endswith(("gate_proj.lora_B.weight", "up_proj.lora_B.weight")):
            # The peer cuts [gate_0; up_0; gate_1; up_1] in halves, so its gate_proj is [gate_0; up_0]; its merged model is cut right.
            gate, up = (ours[name.replace("up_proj", "gate_proj").replace("gate_proj", part)] for part in ("gate_proj", "up_proj"))
            half = slice(0, 48) if "gate_proj" in name else slice(48, 96)
            assert torch.equal(theirs[name], torch.cat([gate[half], up[half]]))
        else:
            assert torch.equal(ours[name], theirs[name]), name


LAYOUTS = [(1, 1, None), (2, 1, None), (1, 4, None), (4, 2, 1), (2, 2, 1)]


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "llama"])
def test_any_layout_to_any_other_and_back(family: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "hf") if family == "llama" else tiny_qwen3(tmp_path / "hf", tied=family.endswith("tied"))
    (source / "tokenizer.json").write_text("{}")
    fingerprints, folder, kind = {open_base(source).fingerprint()}, source, "hf"
    for tp_size, pp_size, chunk in LAYOUTS:
        target = tmp_path / f"tp{tp_size}pp{pp_size}"
        sizes = dict(target_tensor_parallel_size=tp_size, target_pipeline_parallel_size=pp_size, layers_per_virtual_stage=chunk)
        run_convert(kind, "mg", folder, target, **sizes)
        folder, kind = target, "mg"
        base = open_base(target)
        fingerprints.add(base.fingerprint())
        manifest = read_manifest(target)
        assert manifest is not None and manifest.fingerprint == base.fingerprint() and manifest.dtype == "float32"
        verify_parts(target, manifest)
    assert len(fingerprints) == 1, "the fingerprint does not depend on the layout"
    run_convert("mg", "hf", folder, tmp_path / "back", verify=True)
    assert_same_tensors(tmp_path / "back", source)
    assert {path.name for path in source.iterdir()} <= {path.name for path in (tmp_path / "back").iterdir()}


def test_real_weights_survive(tmp_path: Path) -> None:
    source = shared_data() / "stories260k/hf"
    run_convert("hf", "mg", source, tmp_path / "mg", target_tensor_parallel_size=4)
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", source)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_params_dtype_casts_and_says_so_in_config_json(tmp_path: Path) -> None:
    source = tiny_qwen3(tmp_path / "hf")
    run_convert("hf", "mg", source, tmp_path / "mg", params_dtype="bf16")
    base = open_base(tmp_path / "mg")
    assert base.dtype == torch.bfloat16 and base.args is not None and base.args.bf16 and base.args.params_dtype is torch.bfloat16
    assert base.config is not None and base.config.dtype == "bfloat16"
    run_convert("mg", "hf", tmp_path / "mg", tmp_path / "back")
    expected = {name: tensor.bfloat16() for name, tensor in load_folder(source).items()}
    found = load_folder(tmp_path / "back")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_large_models_are_written_in_several_files_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr("mindspeed_lora.conversion.run.write_hugging_face", partial(write_hugging_face, max_shard_bytes=100_000))
    source = tiny_qwen3(tmp_path / "hf")
    run_convert("hf", "hf", source, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors.index.json").is_file() and len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_same_tensors(tmp_path / "out", source)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()["lm_head.weight"], load_folder(source)["lm_head.weight"])


MEMORY_PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from conversion_helpers import run_convert
from safetensors.torch import save_file
import mindspeed_lora.conversion.run, tqdm
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for load, save, source, target, sizes in (
    ("hf", "mg", "hf", "mg", dict(target_tensor_parallel_size=2, target_pipeline_parallel_size=2)),
    ("mg", "hf", "mg", "back", {}),
):
    run_convert(load, save, Path(sys.argv[1]) / source, Path(sys.argv[1]) / target, **sizes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_model_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_qwen3(tmp_path / "hf", num_hidden_layers=8, hidden_size=512, intermediate_size=2048, num_attention_heads=8)
    size_kib = (folder / "model.safetensors").stat().st_size // 1024
    assert size_kib > 100_000
    limit = "import mindspeed_lora.weights.megatron_folder as folder; folder._REOPEN_AFTER_BYTES = 1 << 24\n"
    environment = {
        "PYTHONPATH": ":".join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin",
    }
    result = subprocess.run(
        [sys.executable, "-c", limit + MEMORY_PROGRAM, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    grown_kib = int(result.stdout.split()[-1])
    assert grown_kib < size_kib // 2, f"grew by {grown_kib} KiB for a model of {size_kib} KiB"
