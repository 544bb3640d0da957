"""The package's layers, read from its source: who imports whom, and what importing a module may do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "mindspeed_lora"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Highest first; a module imports its own layer's parts and lower layers only. The verbs are side by side, but evaluation
# asks the model through inference's driver and workers.
LAYERS = [
    {"arguments"},
    {"evaluation"},
    {"training", "inference", "conversion"},
    {"checkpoint"},
    {"lora"},
    {"model"},
    {"parallel"},
    {"data"},
    {"weights"},
    {"ops"},
    {"device"},
    {"manifest"},
    {"files", "log"},
    {"errors"},
    {"__init__"},
]
RANK = {name: height for height, names in enumerate(LAYERS) for name in names}
SHARED_CONFIGS = "mindspeed_lora.arguments.configs"  # plain dataclasses without imports of ours: every layer may name them
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object", "all_to_all", "all_to_all_single",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier",
    "monitored_barrier", "send_object_list", "recv_object_list", "init_process_group", "destroy_process_group",
}  # fmt: skip
ACTING = {"parse_args", "basicConfig", "getLogger", "manual_seed", "set_default_dtype", "set_default_device", "filterwarnings"}
ACTING |= {"init_process_group", "set_num_threads", "mkdir", "open", "read_text", "write_text", "getenv", "setattr", "print"}


def part_of(path: Path) -> str:
    """``mindspeed_lora/data/raw.py`` -> data."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parse(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also of those inside functions; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward(part: str, tree: ast.AST) -> list[str]:
    """Imports of ``part`` that point up, or across to a neighbour."""
    found = []
    for line, module in imported(tree):
        names = module.split(".")
        if names[0] != "mindspeed_lora" or f"{module}.".startswith(f"{SHARED_CONFIGS}."):
            continue
        target = names[1] if len(names) > 1 and names[1] in RANK else "__init__"
        if target != part and RANK[target] <= RANK[part]:
            found.append(f"line {line}: {part} imports {module}")
    return found


def collective_calls(tree: ast.AST) -> list[str]:
    """Uses of ``torch.distributed``'s own communication: ``dist.X``, ``torch.distributed.X``, or X imported from it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES and ast.unparse(node.value) in ("dist", "torch.distributed"):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch.distributed", "torch.distributed.distributed_c10d"):
            found += [f"line {node.lineno}: {alias.name}" for alias in node.names if alias.name in COLLECTIVES]
    return found


def executed(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything but the bodies of functions, of ``TYPE_CHECKING`` and of ``__main__``."""
    pending: list[ast.AST] = list(statements)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
        elif isinstance(node, ast.If) and re.search("TYPE_CHECKING|__main__", ast.unparse(node.test)):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def import_effects(tree: ast.Module) -> list[str]:
    """Statements at import that do something: bare calls, calls known to act, loops, and changes of what belongs to others."""
    found = []
    for statement in tree.body:
        bare_call = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
        if bare_call or isinstance(statement, ast.For | ast.While | ast.With | ast.Delete | ast.AugAssign):
            found.append(f"line {statement.lineno}: {ast.unparse(statement)}")
    for node in executed(tree.body):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ACTING:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            found.append(f"line {node.lineno}: changes {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
            found.append(f"line {node.lineno}: reads the environment")
    return found


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in SOURCES} == set(RANK)
    assert len(SOURCES) > 80


@pytest.mark.parametrize("part", sorted(RANK))
def test_imports_point_down(part: str) -> None:
    found = [f"{path.relative_to(ROOT)} {text}" for path in SOURCES if part_of(path) == part for text in upward(part, parse(path))]
    assert not found


def test_configs_import_nothing_of_ours() -> None:
    modules = [module for _, module in imported(parse(PACKAGE / "arguments" / "configs.py"))]
    assert not [module for module in modules if module.split(".")[0] in ("mindspeed_lora", "torch")]


def test_collectives_only_in_parallel() -> None:
    found = [
        f"{path.relative_to(ROOT)} {text}" for path in SOURCES if part_of(path) != "parallel" for text in collective_calls(parse(path))
    ]
    assert not found


def test_weights_and_data_know_no_processes() -> None:
    paths = [path for path in SOURCES if part_of(path) in ("weights", "data")]
    assert not [(path, module) for path in paths for _, module in imported(parse(path)) if module.startswith("torch.distributed")]


def test_torch_npu_is_used_in_one_place() -> None:
    """Imported in device.py alone; ``npu_*`` kernels are called in ops/ alone (weights/inert.py knows names of its pickles)."""
    for path in SOURCES:
        tree = parse(path)
        names = [module for _, module in imported(tree) if module.split(".")[0] == "torch_npu"]
        texts = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        loads = [text for text in texts if re.match(r"(importlib\.)?(import_module|__import__)\(['\"]torch_npu", text)]
        kernels = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("npu_(?!stub)", node.attr)]
        assert not names, path
        assert not loads or path == PACKAGE / "device.py", path
        assert not kernels or part_of(path) == "ops", (path, kernels)


@pytest.mark.parametrize("path", [*SOURCES, *sorted(ROOT.glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_importing_has_no_effect(path: Path) -> None:
    if path.name == "setup.py":
        pytest.skip("run by pip, never imported")
    assert not import_effects(parse(path))


def test_faults_are_found() -> None:
    """Each rule sees what it is for."""
    assert upward("weights", ast.parse("def f():\n    from mindspeed_lora.parallel.context import X"))
    assert upward("data", ast.parse("import mindspeed_lora.weights.table")) == []
    assert upward("training", ast.parse("from mindspeed_lora.inference.run import infer"))
    assert upward("model", ast.parse("from mindspeed_lora.arguments.cli import main"))
    assert upward("model", ast.parse("from mindspeed_lora import lora"))
    assert upward("model", ast.parse("from mindspeed_lora.arguments.configs import RecomputeFlags")) == []
    assert collective_calls(ast.parse("import torch.distributed as dist\ndist.all_reduce(x)"))
    assert collective_calls(ast.parse("from torch.distributed import broadcast"))
    assert collective_calls(ast.parse("dist.ReduceOp.MAX; dist.new_group([0])")) == []
    for text in (
        "parser.parse_args()",
        "X = open('a')",
        "torch.foo = 1",
        "for x in y: z(x)",
        "A = os.environ['B']",
        "class C:\n    print()",
    ):
        assert import_effects(ast.parse(text)), text
    assert import_effects(ast.parse("if __name__ == '__main__':\n    main()\ndef f():\n    print()\nX = frozenset([1])")) == []
