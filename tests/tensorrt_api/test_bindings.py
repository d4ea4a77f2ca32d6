"""Our TensorRT code against the real bindings of both majors: by types, and name by name.

Nothing is executed: there is no GPU where these tests run, and the libraries behind the bindings are empty.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cuda.bindings import runtime as cuda

import dckt.runtime.tensorrt

PACKAGE = Path(dckt.runtime.tensorrt.__file__).parent
SDK = PACKAGE.parents[2]
MODULES = sorted(PACKAGE.glob("*.py"))
# What no engine can do without. If the walk over our code no longer sees these, it proves nothing.
SEEN = {
    "Builder.build_serialized_network",
    "Builder.create_network",
    "Dims.__init__",
    "EngineInspector.execution_context",
    "EngineInspector.get_engine_information",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.hardware_compatibility_level",
    "IBuilderConfig.profiling_verbosity",
    "IBuilderConfig.progress_monitor",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.set_timing_cache",
    "ICudaEngine.create_engine_inspector",
    "ICudaEngine.create_execution_context",
    "ICudaEngine.get_tensor_profile_shape",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_tensor_address",
    "INetworkDefinition.get_input",
    "IOptimizationProfile.set_shape",
    "ITensor.dtype",
    "ITimingCache.combine",
    "ITimingCache.serialize",
    "OnnxParser.parse_from_file",
    "ParserError.node_operator",
    "Runtime.deserialize_cuda_engine",
}
CUDA_SEEN = {"cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaMemcpyAsync", "cudaStreamSynchronize"}


def test_bindings_are_those_that_were_asked_for(bindings: Any, request: pytest.FixtureRequest) -> None:
    assert bindings.facts["version"].startswith(request.node.callspec.params["bindings"] + ".")
    assert len(bindings.facts["module"]) > 150


def test_types_fit(bindings: Any, tmp_path: Path) -> None:
    finished = mypy(bindings.stubs)
    assert finished.returncode == 0, finished.stdout
    assert f"no issues found in {len(MODULES)} source files" in finished.stdout


def test_types_would_show_mistakes(bindings: Any, tmp_path: Path) -> None:
    encoder = planted(tmp_path, "encoder.py", ".execute_async_v3(", ".execute_async_v4(")
    build = planted(tmp_path, "build.py", "set_timing_cache(cache, False)", "set_timing_cache(cache)")
    build.write_text(build.read_text().replace("trt.BuilderFlag.TF32", "trt.BuilderFlag.TF23"))
    finished = mypy(bindings.stubs, shadows={PACKAGE / "encoder.py": encoder, PACKAGE / "build.py": build})
    assert finished.returncode == 1
    assert "Found 3 errors in 2 files" in finished.stdout
    assert 'has no attribute "execute_async_v4"' in finished.stdout
    assert 'Missing positional argument "ignore_mismatch" in call to "set_timing_cache"' in finished.stdout
    assert 'has no attribute "TF23"' in finished.stdout


def test_names_and_arguments_fit(bindings: Any) -> None:
    seen, mistakes = set(), []
    for module in MODULES:
        walk = Walk(bindings.facts["module"], ast.parse(module.read_text()))
        seen |= walk.seen
        mistakes += [f"{module.name}: {mistake}" for mistake in walk.mistakes]
    assert not mistakes
    assert seen >= SEEN, sorted(SEEN - seen)


@pytest.mark.parametrize(
    ("module", "right", "wrong", "message"),
    [
        ("encoder.py", ".execute_async_v3(", ".execute_async_v4(", "IExecutionContext has no execute_async_v4"),
        ("build.py", "set_timing_cache(cache, False)", "set_timing_cache(cache)", "set_timing_cache takes 2, given 1"),
        ("build.py", "config.progress_monitor =", "config.progress_monitors =", "has no progress_monitors"),
        ("build.py", "trt.DataType.INT64", "trt.DataType.LONG", "DataType has no LONG"),
        ("build.py", "def phase_finish", "def phase_finished", "IProgressMonitor.phase_finish is not overridden"),
        ("encoder.py", "_sizes(smallest)", "_sizes(smallest.sizes)", "Dims has no sizes"),
    ],
)
def test_names_would_show_a_mistake(
    bindings: Any, tmp_path: Path, module: str, right: str, wrong: str, message: str
) -> None:
    mistaken = planted(tmp_path, module, right, wrong)
    mistakes = Walk(bindings.facts["module"], ast.parse(mistaken.read_text())).mistakes
    assert len(mistakes) == 1
    assert message in mistakes[0]


def test_host_memory_is_a_buffer(bindings: Any) -> None:
    """``bytes(plan)`` and ``bytes(cache.serialize())`` go by the buffer protocol."""
    module = bindings.facts["module"]
    assert module["IHostMemory"]["buffer"]
    assert not module["ICudaEngine"]["buffer"]


def test_flag_of_strong_typing_is_in_both(bindings: Any) -> None:
    """One code path: 11 keeps the flag of 10 and ignores it, and has no builder flag for a precision."""
    module = bindings.facts["module"]
    assert "STRONGLY_TYPED" in module["NetworkDefinitionCreationFlag"]["members"]
    builder_has_fp16 = "FP16" in module["BuilderFlag"]["members"]
    assert builder_has_fp16 == bindings.facts["version"].startswith("10.")


def test_tensorrt_is_never_used_before_load() -> None:
    """A function that imports it has called ``load`` or was handed an object of it; nothing imports it at the top."""
    checked = 0
    for module in MODULES:
        tree = ast.parse(module.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and any(map(is_tensorrt_import, function.body)):
                place = next(number for number, part in enumerate(function.body) if is_tensorrt_import(part))
                before = [ast.unparse(part) for part in function.body[:place]]
                handed = any("trt." in ast.unparse(one.annotation or ast.Constant(0)) for one in function.args.args)
                assert handed or "load()" in before, f"{module.name}: {function.name}"
                checked += 1
        at_top = [part for part in tree.body if is_tensorrt_import(part)]
        assert not at_top, module.name
    assert checked >= 6


def test_cuda_names_and_arguments_fit() -> None:
    seen: set[str] = set()
    mistakes: list[str] = []
    for module in MODULES:
        names, wrong = cuda_uses(ast.parse(module.read_text()))
        seen |= names
        mistakes += [f"{module.name}: {mistake}" for mistake in wrong]
    assert not mistakes
    assert seen >= CUDA_SEEN


@pytest.mark.parametrize(
    ("module", "right", "wrong", "message"),
    [
        ("encoder.py", "cuda.cudaStreamSynchronize", "cuda.cudaStreamSynchronise", "no cudaStreamSynchronise"),
        ("encoder.py", "cudaMalloc, size)", "cudaMalloc, size, 0)", "cudaMalloc takes 1, given 2"),
        ("encoder.py", "cudaMemcpyKind.cudaMemcpyHostToDevice", "cudaMemcpyKind.HostToDevice", "no HostToDevice"),
    ],
)
def test_cuda_names_would_show_a_mistake(tmp_path: Path, module: str, right: str, wrong: str, message: str) -> None:
    mistaken = planted(tmp_path, module, right, wrong)
    _, mistakes = cuda_uses(ast.parse(mistaken.read_text()))
    assert len(mistakes) == 1
    assert message in mistakes[0]


# --- types --------------------------------------------------------------------------------------------------


def mypy(stubs: Path, shadows: Mapping[Path, Path] | None = None) -> subprocess.CompletedProcess[str]:
    config = stubs.parent / "mypy.ini"
    lines = ["[mypy]", "strict = true", "explicit_package_bases = true", "follow_imports = silent"]
    # "type: ignore" is for where TensorRT is not installed.
    lines += ["warn_unused_ignores = false", "[mypy-tensorrt.*]", "ignore_errors = true"]
    lines += ["[mypy-cuda.*,onnxruntime.*]", "ignore_missing_imports = true"]
    config.write_text("\n".join(lines) + "\n")
    # The cache would not notice that another file stands in.
    cache = os.devnull if shadows else str(stubs.parent / "mypy")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", cache]
    for original, stand_in in (shadows or {}).items():
        command += ["--shadow-file", str(original), str(stand_in)]
    return subprocess.run(
        [*command, str(PACKAGE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, (SDK, stubs)))},
    )


def planted(folder: Path, module: str, right: str, wrong: str) -> Path:
    """A copy of a module with one mistake."""
    text = (PACKAGE / module).read_text()
    assert right in text
    copy = folder / module
    copy.write_text(text.replace(right, wrong, 1))
    return copy


def is_tensorrt_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import) and node.names[0].name == "tensorrt"


# --- names and arguments ------------------------------------------------------------------------------------


class Signature(NamedTuple):
    names: tuple[str, ...]  # of the parameters, without self
    required: int
    returns: str


class Walk:
    """Follows TensorRT's objects through a module of ours and compares every use with what the bindings offer.

    A value is described by a word: ``"trt"`` is the module, ``"=X"`` the class X, ``"X"`` an object of it, ``"X.m"`` a
    method of one, ``"list[X]"`` a list.

    Attributes:
        seen: every ``Class.attribute`` that was checked.
        mistakes: what does not fit.
    """

    def __init__(self, module: Mapping[str, Any], tree: ast.Module) -> None:
        self.module, self.seen, self.mistakes = module, set[str](), list[str]()
        self.returns = {
            node.name: annotated(node.returns) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }
        self.fields = {
            node.target.attr: annotated(node.annotation)
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute)
        }
        self.body(tree.body, {})

    def body(self, statements: Sequence[ast.stmt], known: dict[str, str]) -> None:
        for statement in statements:
            if isinstance(statement, ast.FunctionDef):
                arguments = {one.arg: annotated(one.annotation) for one in statement.args.args}
                self.body(statement.body, {**known, **arguments})
            elif isinstance(statement, ast.ClassDef):
                self.overrides(statement, known)
                self.body(statement.body, dict(known))
            elif isinstance(statement, ast.Import):
                known.update({one.asname: "trt" for one in statement.names if one.name == "tensorrt" and one.asname})
            else:
                self.statement(statement, known)

    def statement(self, statement: ast.stmt, known: dict[str, str]) -> None:
        inner = [
            name for name, value in ast.iter_fields(statement) if name in {"body", "orelse", "finalbody"} and value
        ]
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.expr | ast.withitem | ast.keyword):
                self.expression(child, known)
            elif isinstance(child, ast.ExceptHandler):
                self.body(child.body, known)
        if isinstance(statement, ast.Assign):
            self.assign(statement.targets[0], statement.value, known)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            known[statement.target.id] = annotated(statement.annotation) or ""
        for name in inner:
            self.body(getattr(statement, name), known)

    def assign(self, target: ast.expr, value: ast.expr, known: dict[str, str]) -> None:
        kind = self.value(value, known)
        if isinstance(target, ast.Name):
            known[target.id] = kind
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self.assign(one, its, known)
        elif isinstance(target, ast.Tuple) and kind.startswith("list["):
            known.update({one.id: kind[5:-1] for one in target.elts if isinstance(one, ast.Name)})
        elif isinstance(target, ast.Attribute):
            owner = self.value(target.value, known)
            fact = self.attributes(owner).get(target.attr)
            if fact and not fact.get("writable"):
                self.mistakes.append(f"{owner}.{target.attr} cannot be set")

    def expression(self, node: ast.AST, known: dict[str, str]) -> None:
        """Checks every part of an expression, each once: the innermost first."""
        for child in ast.iter_child_nodes(node):
            self.expression(child, known)
        if isinstance(node, ast.Attribute | ast.Call):
            self.value(node, known, report=True)

    def value(self, node: ast.expr, known: Mapping[str, str], *, report: bool = False) -> str:
        if isinstance(node, ast.Name):
            return known.get(node.id, "")
        if isinstance(node, ast.Subscript):
            kind = self.value(node.value, known)
            return kind[5:-1] if kind.startswith("list[") else ""
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.fields.get(node.attr, "")
            return self.attribute(self.value(node.value, known), node.attr, report)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                return self.returns.get(node.func.id, "")
            return self.call(self.value(node.func, known), node, report)
        return ""

    def attribute(self, owner: str, name: str, report: bool) -> str:
        if owner == "trt":
            fact = self.module.get(name)
            if fact is None and report and name != "__version__":
                self.mistakes.append(f"tensorrt has no {name}")
            return f"={name}" if fact and fact["kind"] == "class" else ""
        attributes = self.attributes(owner)
        if not attributes:
            return ""
        kind = owner.removeprefix("=")
        if name not in attributes:
            if report:
                self.mistakes.append(f"{kind} has no {name}")
            return ""
        if report:
            self.seen.add(f"{kind}.{name}")
        fact = attributes[name]
        if fact["kind"] == "class":
            return f"={kind}.{name}"
        if name in self.fact(kind).get("members", ()):
            return kind
        if fact["kind"] == "property":
            return plain(str(fact["doc"]).rpartition("-> ")[2].partition("\n")[0])
        return f"{kind}.{name}"

    def call(self, called: str, node: ast.Call, report: bool) -> str:
        made = called.startswith("=")
        kind, _, name = called.removeprefix("=").rpartition(".") if not made else (called[1:], "", "__init__")
        fact = self.attributes(kind).get(name)
        if not fact or not fact.get("doc"):
            return ""
        signatures = list(parse(fact["doc"], name))
        if not signatures:
            return kind if made else ""
        given, keywords = len(node.args), {one.arg for one in node.keywords}
        if isinstance(node.func, ast.Attribute) and name == "__init__" and not made:
            given -= 1  # called on the class, with self
        if report:
            self.seen.add(f"{kind}.{name}")
            if not any(fits(one, given, keywords) for one in signatures):
                takes = " or ".join(str(len(one.names)) for one in signatures)
                self.mistakes.append(f"{kind}.{name} takes {takes}, given {given + len(keywords)}")
        return kind if made else signatures[0].returns

    def overrides(self, node: ast.ClassDef, known: Mapping[str, str]) -> None:
        own = {one.name: len(one.args.args) - 1 for one in node.body if isinstance(one, ast.FunctionDef)}
        for base in node.bases:
            kind = self.value(base, known).removeprefix("=")
            for name, fact in self.attributes(kind).items():
                if name.startswith("_") or fact["kind"] != "callable":
                    continue
                self.seen.add(f"{kind}.{name}")
                if name not in own:
                    self.mistakes.append(f"{kind}.{name} is not overridden")
                elif own[name] not in {len(one.names) for one in parse(fact["doc"], name)}:
                    self.mistakes.append(f"{kind}.{name} is overridden with {own[name]} parameters")

    def fact(self, kind: str) -> Mapping[str, Any]:
        first, *rest = kind.removeprefix("=").split(".")
        fact = self.module.get(first, {})
        for name in rest:
            fact = fact.get("attributes", {}).get(name, {})
        return fact if fact.get("kind") == "class" else {}

    def attributes(self, kind: str) -> Mapping[str, Any]:
        return self.fact(kind).get("attributes", {})  # type: ignore[no-any-return]


def annotated(annotation: ast.expr | None) -> str:
    """X, if an annotation is ``trt.X`` or that or None."""
    found = re.fullmatch(r"(trt\.(\w+))( \| None)?", ast.unparse(annotation)) if annotation else None
    return found[2] if found else ""


def parse(doc: str, name: str) -> Iterator[Signature]:
    """The signatures that pybind11 writes into a docstring, one for each overload."""
    for line in doc.splitlines():
        found = re.fullmatch(rf"(?:\d+\. )?{name}\((.*)\) -> (.+)", line.strip())
        if found and not found[1].startswith("*args"):
            parameters = list(split(found[1]))
            names = tuple(one.partition(":")[0].strip() for one in parameters if not one.strip().startswith("self"))
            optional = sum("=" in one for one in parameters)
            yield Signature(names, len(names) - optional, plain(found[2]))


def split(text: str) -> Iterator[str]:
    """At commas outside of brackets."""
    depth = start = 0
    for place, letter in enumerate(text):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and not depth:
            yield text[start:place]
            start = place + 1
    if text[start:].strip():
        yield text[start:]


def plain(kind: str) -> str:
    """``tensorrt.tensorrt.X`` is X, of lists, too; ``nvinfer1::IX``, which pybind11 did not know yet, is IX."""
    return re.sub(r"[\w.]*\.(?=\w)|\w+::", "", kind.strip())


def fits(signature: Signature, given: int, keywords: set[str | None]) -> bool:
    return signature.required <= given + len(keywords) <= len(signature.names) and keywords <= set(
        signature.names[given:]
    )


# --- the CUDA runtime ---------------------------------------------------------------------------------------


def cuda_uses(tree: ast.Module) -> tuple[set[str], list[str]]:
    """Every name that a module takes from the CUDA runtime, and what does not fit the installed bindings."""
    seen, mistakes = set[str](), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_cuda(node.value):
            seen.add(node.attr)
            if not hasattr(cuda, node.attr):
                mistakes.append(f"no {node.attr}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and is_cuda(node.value.value):
            if not hasattr(getattr(cuda, node.value.attr, None), node.attr):
                mistakes.append(f"{node.value.attr} has no {node.attr}")
        elif isinstance(node, ast.Call):
            function, given = called(node)
            if function is not None and hasattr(cuda, function.attr):
                takes = len(inspect.signature(getattr(cuda, function.attr)).parameters)
                if takes != given:
                    mistakes.append(f"{function.attr} takes {takes}, given {given}")
    return seen, mistakes


def called(node: ast.Call) -> tuple[ast.Attribute | None, int]:
    """The CUDA function behind ``call(f, ...)``, ``stack.callback(call, f, ...)`` and ``cuda.f(...)``."""
    arguments = [node.func, *node.args]
    while arguments and not (isinstance(arguments[0], ast.Attribute) and is_cuda(arguments[0].value)):
        name = ast.unparse(arguments.pop(0))
        if name not in {"call", "stack.callback"}:
            return None, 0
    first = arguments[0] if arguments else None
    return (first, len(arguments) - 1) if isinstance(first, ast.Attribute) else (None, 0)


def is_cuda(node: ast.expr) -> bool:
    return ast.unparse(node) in {"cuda", "self._cuda", "cuda_runtime()"}
