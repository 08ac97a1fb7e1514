"""0005: the layout tensors of the V2 model runner's block tables after a sleep (upstream #40648, #53508).

The tensors lie in the memory pool of the KV cache, whose contents a sleep discards. Right is: nothing but the
cache in that pool, or the tensors filled again after the wake-up. Replacing them by *new* tensors is enough
only as long as no CUDA graph has captured the old ones (upstream #46849 captured them again).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from .base import Finding, ReadFile, Site
from .source import Source, assigned_once, calls_in, inlined, keyword_of, names_in, open_source, statements

FIX = "0005"
PARTS = ("wake-up-hook", "layout-refresh")
WORKER = "vllm/v1/worker/gpu_worker.py"
RUNNERS = ("vllm/v1/worker/gpu/model_runner.py", "vllm/v1/worker/gpu_model_runner.py")
BLOCK_TABLE = "vllm/v1/worker/gpu/block_table.py"
SLEEP_BACKEND = "vllm/device_allocator/sleep_mode_backend.py"
_SPEC_DECODE = "vllm/v1/worker/gpu/spec_decode"
SPECULATORS = (
    f"{_SPEC_DECODE}/eagle.py",
    f"{_SPEC_DECODE}/eagle/speculator.py",
    f"{_SPEC_DECODE}/autoregressive/speculator.py",
    f"{_SPEC_DECODE}/multi_module_mtp/speculator.py",
)
PATHS = (WORKER, *RUNNERS, BLOCK_TABLE, SLEEP_BACKEND, *SPECULATORS)

_HOOK = "post_kv_cache_wake_up"
_POOL = "kv_cache"
_LAYOUT = ("block_table_ptrs", "block_table_strides", "block_sizes_tensor", "input_block_table_ptrs")
_READERS = ("compute_slot_mappings", "gather_block_tables")  # their kernels read the layout tensors


def probe(read: ReadFile) -> tuple[Site, ...]:
    """The hook and the refreshed tensors of 0005."""
    worker = open_source(read, WORKER)
    allocation, tags = _allocation(worker)
    if _POOL not in tags:
        note = _what_keeps_the_rest(read, worker, tags)
        return tuple(Site(FIX, part, Finding.ELSEWISE, WORKER, allocation.lineno, note) for part in PARTS)
    hook = _hook(read, worker)
    return (hook, _layout(read, hook))


def _allocation(worker: Source) -> tuple[ast.Call, tuple[str, ...]]:
    """The call that makes the KV cache, and the tags of the memory pools that are entered around it."""
    function = worker.need_function("initialize_from_config")
    values = assigned_once(function.body)
    calls = calls_in(function, "initialize_kv_cache")
    if not calls:
        raise worker.unknown("initialize_from_config does not call initialize_kv_cache")
    # With sleep mode and without it may be two calls; the pool around either of them counts.
    around = [node for call in calls for node in _withs_around(function, call)]
    return calls[0], tuple(tag for node in around for tag in _pool_tags(worker, node, values))


def _withs_around(function: ast.FunctionDef, call: ast.Call) -> Iterator[ast.With]:
    for node in ast.walk(function):
        if isinstance(node, ast.With) and any(child is call for child in ast.walk(node)):
            yield node


def _pool_tags(worker: Source, node: ast.With, values: dict[str, ast.expr]) -> Iterator[str]:
    for item in node.items:
        context = inlined(item.context_expr, values)
        pools = calls_in(context, "use_memory_pool") + calls_in(context, "_maybe_get_memory_pool_context")
        for pool in pools:
            tag = keyword_of(pool, "tag") or (pool.args[0] if pool.args else None)
            if not (isinstance(tag, ast.Constant) and isinstance(tag.value, str)):
                raise worker.unknown(f"the tag of the memory pool at line {pool.lineno}")
            yield tag.value
        if not pools:
            raise worker.unknown(f"the context {ast.unparse(item.context_expr)} around initialize_kv_cache")


def _what_keeps_the_rest(read: ReadFile, worker: Source, tags: tuple[str, ...]) -> str:
    """Why everything but the cache survives a sleep: out of the pools, or in one that is saved."""
    runner = open_source(read, RUNNERS[0])
    if not all("kv_cache_allocation_context" in source.text for source in (worker, runner)):
        raise worker.unknown("initialize_kv_cache runs outside the KV cache's pool and is not handed it either")
    if not tags:
        return "only the cache itself is allocated in the pool that a sleep discards"
    backend = open_source(read, SLEEP_BACKEND)
    function = backend.need_function("suspend", within="CuMemBackend")
    kept = _assigned_words(function, "offload_tags")
    if not kept or any(set(tags) - names for names in kept):
        raise backend.unknown(f"whether a sleep saves the memory pools {', '.join(tags)}")
    return f"only the cache itself is in the discarded pool; a sleep saves the pool {', '.join(tags)}"


def _assigned_words(function: ast.FunctionDef, name: str) -> list[set[str]]:
    """The strings in every tuple that *name* gets; a starred *name* in one adds those it had."""
    found: list[set[str]] = []
    for statement, _ in statements(function.body):
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        target = statement.target if isinstance(statement, ast.AnnAssign) else target
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if value is None or target is None or ast.unparse(target) != name:
            continue
        words = {node.value for node in ast.walk(value) if isinstance(node, ast.Constant)}
        if name in names_in(value) and found:
            words |= found[-1]
        found.append({word for word in words if isinstance(word, str)})
    return found


def _hook(read: ReadFile, worker: Source) -> Site:
    wake_up = worker.need_function("wake_up", within="Worker")
    calls = calls_in(wake_up, _HOOK)
    if not calls:
        for name in _methods_called(wake_up, "self.model_runner"):
            if name != "init_fp8_kv_scales":
                raise worker.unknown(f"what model_runner.{name} does after a wake-up")
        line = next((call.lineno for call in calls_in(wake_up, "init_fp8_kv_scales")), wake_up.lineno)
        return Site(FIX, PARTS[0], Finding.MISSING, WORKER, line, f"wake_up does not call {_HOOK}")
    tests = [
        ast.unparse(test)
        for statement, conditions in statements(wake_up.body)
        if isinstance(statement, ast.Expr) and statement.value is calls[0]
        for test, outcome in conditions
        if outcome
    ]
    if any("fp8" in test or "quantized" in test for test in tests):
        note = f"{_HOOK} is called for a quantized cache only"
        return Site(FIX, PARTS[0], Finding.MISSING, WORKER, calls[0].lineno, note)
    if not all(any(half in test for test in tests) for half in ("tags is None or", "'kv_cache' in tags")):
        raise worker.unknown(f"for which tags {_HOOK} is called at line {calls[0].lineno}")
    mapped = [call.lineno for name in ("wake_up", "resume") for call in calls_in(wake_up, name)]
    if not mapped or calls[0].lineno < min(mapped):
        raise worker.unknown(f"whether the memory is mapped again when {_HOOK} is called")
    lacking = [path for path in RUNNERS if f"def {_HOOK}(" not in open_source(read, path).text]
    if lacking:
        note = f"no {_HOOK} in {', '.join(lacking)}"
        return Site(FIX, PARTS[0], Finding.MISSING, WORKER, calls[0].lineno, note)
    old = open_source(read, RUNNERS[1]).need_function(_HOOK)
    if not calls_in(old, "init_fp8_kv_scales"):
        note = f"{_HOOK} of {RUNNERS[1]} leaves the FP8 scales as they are"
        return Site(FIX, PARTS[0], Finding.MISSING, WORKER, calls[0].lineno, note)
    note = f"wake_up calls {_HOOK} for every cache"
    return Site(FIX, PARTS[0], Finding.PRESENT, WORKER, calls[0].lineno, note)


def _layout(read: ReadFile, hook: Site) -> Site:
    source = open_source(read, BLOCK_TABLE)
    lines = {name: _first_assignment(source, name) for name in _LAYOUT}
    first = min(lines.values())
    if hook.finding is not Finding.PRESENT:
        return _layout_site(Finding.MISSING, first, "never filled again after a sleep")
    replaced, filled = _refreshed(read, source)
    forgotten = [name for name in _LAYOUT if name not in {**replaced, **filled}]
    if forgotten:
        return _layout_site(Finding.MISSING, lines[forgotten[0]], f"not filled again: {', '.join(forgotten)}")
    if not replaced:
        return _layout_site(Finding.PRESENT, min(filled.values()), "filled in place, addresses kept")
    captured = _captured_reader(read)
    if captured is None:
        note = "re-created; no draft graph captures their addresses"
        return _layout_site(Finding.PRESENT, min(replaced.values()), note)
    note = f"re-created, but the draft graph captured the old addresses: {captured}"
    return _layout_site(Finding.MISSING, min(replaced.values()), note)


def _layout_site(finding: Finding, line: int, note: str) -> Site:
    return Site(FIX, PARTS[1], finding, BLOCK_TABLE, line, note)


def _first_assignment(source: Source, name: str) -> int:
    match = re.search(rf"^ +self\.{name}(?::[^=]+)? = ", source.text, re.MULTILINE)
    if match is None:
        raise source.unknown(f"no layout tensor {name}")
    return source.line_at(match.start())


def _refreshed(read: ReadFile, tables: Source) -> tuple[dict[str, int], dict[str, int]]:
    """The layout tensors that the runner's hook replaces by new ones, and those that it fills in place."""
    runner = open_source(read, RUNNERS[0]).need_function(_HOOK)
    todo = _methods_called(runner, "self.block_tables")
    replaced: dict[str, int] = {}
    filled: dict[str, int] = {}
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        method = tables.need_function(name, within="BlockTables")
        for statement, _ in statements(method.body):
            _note_refresh(statement, replaced, filled)
        todo += _methods_called(method)
    return replaced, {name: line for name, line in filled.items() if name not in replaced}


def _note_refresh(statement: ast.stmt, replaced: dict[str, int], filled: dict[str, int]) -> None:
    if isinstance(statement, ast.Assign):
        target = statement.targets[0]
        where = filled if isinstance(target, ast.Subscript) else replaced
        target = target.value if isinstance(target, ast.Subscript) else target
        if ast.unparse(target).removeprefix("self.") in _LAYOUT:
            where[ast.unparse(target).removeprefix("self.")] = statement.lineno
    elif isinstance(statement, ast.Expr):
        for call in calls_in(statement, "copy_"):
            if isinstance(call.func, ast.Attribute):
                name = ast.unparse(call.func.value).removeprefix("self.")
                if name in _LAYOUT:
                    filled[name] = statement.lineno


def _methods_called(method: ast.FunctionDef, owner: str = "self") -> list[str]:
    return [
        call.func.attr
        for call in ast.walk(method)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == owner
    ]


def _captured_reader(read: ReadFile) -> str | None:
    """``file:line`` where a captured draft function reads the layout tensors, None if none does."""
    known = False
    for path in SPECULATORS:
        text = read(path)
        if text is None:
            continue
        known = True
        line = _captured_in(Source(path, text))
        if line is not None:
            return f"{path}:{line}"
    if not known:
        raise open_source(read, RUNNERS[0]).unknown("what is captured: no draft model that this probe knows")
    return None


def _captured_in(source: Source) -> int | None:
    if not any(reader in source.text for reader in _READERS):
        return None
    methods = {node.name: node for node in ast.walk(ast.parse(source.text)) if isinstance(node, ast.FunctionDef)}
    todo = [name for method in methods.values() for name in _captured_methods(method)]
    if not todo:
        raise source.unknown("nothing is captured here, though it computes slot mappings")
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen or name not in methods:
            continue
        seen.add(name)
        for reader in _READERS:
            for call in calls_in(methods[name], reader):
                return call.lineno
        todo += _methods_called(methods[name])
    return None


def _captured_methods(method: ast.FunctionDef) -> list[str]:
    """Methods of self that are given to ``<manager>.capture(...)``, directly or by a local name."""
    values = assigned_once(method.body)
    found = []
    for call in calls_in(method, "capture"):
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            for node in ast.walk(inlined(argument, values)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                    found.append(node.attr)
    return found
