"""Patches of NNI's concrete tracer, for today's PyTorch and Python."""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import inspect
import operator
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, MethodDescriptorType, SimpleNamespace
from typing import Any

import torch
from nni.common.concrete_trace_utils import concrete_proxy, concrete_tracer, operator_patcher
from torch.fx.node import Node


def restore_tensor_methods() -> bool:
    """Let the tracer find the methods of ``torch.Tensor`` again.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``ConcreteTracer.trace``. Cause: it knows methods by
    qualified names that start with ``_TensorBase``; the class is ``TensorBase`` now, so that every trace ended in an
    AttributeError at a static builtin. The patch gives methods the entries that NNI would have given them; a method
    that ``torch.Tensor`` overrides in Python is listed under its override, and static builtins are dropped.
    """
    table = concrete_tracer.ConcreteTracer.default_autowrap_leaf_function
    misplaced = [
        function
        for function, (positions, _, _) in table.items()
        if function.__qualname__.startswith("TensorBase.") and (torch.Tensor, function.__name__) not in positions
    ]
    for function in misplaced:
        _place(table, function)
    return bool(misplaced)


def accept_purity_argument() -> bool:
    """Let NNI's test of a node's purity take the argument that PyTorch passes.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``node_is_impure_wrapper(node)``. Cause: it replaces
    ``torch.fx.Node.is_impure``, which also takes ``impure_random``, so that every trace ended in a TypeError. NNI's
    rule stays: a random operation without users is removed.
    """
    is_impure = concrete_tracer.node_is_impure_wrapper
    passed = len(inspect.signature(concrete_tracer._orig_node_is_impure).parameters)
    code = is_impure.__code__
    if code.co_flags & inspect.CO_VARARGS or code.co_argcount >= passed:
        return False

    def is_impure_as_nni_says(node: Node, *_: Any, **__: Any) -> bool:
        return bool(is_impure(node))

    concrete_tracer.node_is_impure_wrapper = is_impure_as_nni_says
    return True


def postpone_annotations() -> bool:
    """Let functions with annotations such as ``list[Tensor]`` be traced.

    Place: ``nni/common/concrete_trace_utils/operator_patcher.py``, ``OperatorPatcher.patch_inner_helper``. Cause: it
    compiles a traced function again while ``list`` and ``dict`` are stand-ins that take no subscript: a TypeError. With
    the patch the second compilation doesn't evaluate annotations; nothing reads them.
    """
    if "compile" in vars(operator_patcher):
        return False
    operator_patcher.compile = functools.partial(compile, flags=__future__.annotations.compiler_flag)
    return True


def name_class_of_super() -> bool:
    """Let ``super()`` in a traced method refer to the class that defines the method.

    Place: ``nni/common/concrete_trace_utils/operator_patcher.py``, ``TransformerOp.visit_Call``. Cause: it writes
    ``super(self.__class__, self)``, so that a method inherited by a subclass calls itself: a RecursionError.
    """
    _, tree = operator_patcher.TransformerOp().visit_start(ast.parse("super()"))
    if "self.__class__" not in ast.unparse(tree):
        return False

    rewrite = operator_patcher.TransformerOp.visit_Call

    def visit_call(self: ast.NodeTransformer, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            # a method that calls super() has the free variable __class__, which NNI makes a global
            names = [ast.Name(id=name, ctx=ast.Load()) for name in ("__class__", "self")]
            return ast.Call(func=node.func, args=[*names], keywords=[])
        rewritten: ast.AST = rewrite(self, node)
        return rewritten

    operator_patcher.TransformerOp.visit_Call = visit_call
    return True


def run_leaves_with_classes() -> bool:
    """Let functions and modules that the tracer doesn't enter find Python's own classes, not the tracer's stand-ins.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``ConcreteTracer.run_target``. Cause: while a model
    is traced, ``list``, ``bool``, ``type`` and others are objects that look like the classes. PyTorch's own functions
    found them too, e.g. in max pooling without a stride and in unpooling: a TypeError or an AssertionError.
    """
    tracer = concrete_tracer.ConcreteTracer
    run = tracer.run_target
    if run.__module__ == __name__ or "clz_wrapper_map" not in tracer.trace.__code__.co_names:
        return False

    def run_target(self: Any, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # placeholders run before the first stand-in is made
        classes = vars(self).get("clz_wrapper_map", {}).values()
        places = [(vars(sys.modules[cls.__module__]), cls.__name__, cls) for cls in classes]
        found = [(names, name, names[name]) for names, name, _ in places]
        try:
            for names, name, cls in places:
                names[name] = cls
            return run(self, kind, target, args, kwargs)
        finally:
            for names, name, stand_in in found:
                names[name] = stand_in

    tracer.run_target = run_target
    return True


def keep_apply_of_functions() -> bool:
    """Put ``torch.autograd.Function.apply`` back after a trace.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, the end of ``ConcreteTracer.trace``. Cause: it
    deletes the method, which in old versions of PyTorch was inherited from C and is defined in Python now. After the
    first trace no custom autograd function ran under ``torch.func``; before PyTorch 2.14 no decoder of Transformers ran
    without a mask.
    """
    tracer, function = concrete_tracer.ConcreteTracer, torch.autograd.Function
    trace = tracer.trace
    if "delattr" not in trace.__code__.co_names:
        return False

    @functools.wraps(trace)
    def trace_and_put_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        apply = vars(function).get("apply")
        try:
            return trace(self, *args, **kwargs)
        finally:
            if apply is not None:
                function.apply = apply

    tracer.trace = trace_and_put_back
    return True


def write_stand_ins_as_types() -> bool:
    """Let the stand-ins of builtin classes be used in types: ``list[int]``, ``int | None``.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``_create_wrapped_leaf_iterable_class`` and
    ``_create_wrapped_leaf_class``. Cause: the stand-ins take no subscript and no ``|``, so that a forward with
    ``isinstance(size, int | None)`` ended in a TypeError.
    """
    if hasattr(type(concrete_tracer._create_wrapped_leaf_iterable_class(None, list)), "__getitem__"):
        return False
    for name in ("_create_wrapped_leaf_iterable_class", "_create_wrapped_leaf_class"):
        setattr(concrete_tracer, name, _typed(getattr(concrete_tracer, name)))
    return True


def wrap_functions_as_meant() -> bool:
    """Let ``type(value) is tuple`` be true for a tuple, and let PyTorch's code call its own ``torch.functional``.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``_create_wrapped_leaf_func``. Cause: ``type``
    returns the class, but during a trace the name ``tuple`` is the class's stand-in: models with such a check
    (DistilBERT) raised their own errors. Also, ``torch.norm`` and others of ``torch.functional`` are replaced by a
    wrapper that calls the builtin of the same name when PyTorch's code calls it; the builtin takes other arguments, so
    that ``normalize``, ``mse_loss`` and others ended in a TypeError.
    """
    make = concrete_tracer._create_wrapped_leaf_func
    if make(SimpleNamespace(temp_disable_call=True), lambda: False, lambda: True)():
        return False

    def make_wrapper(tracer: Any, func: Callable[..., Any], to_func: Callable[..., Any] | None, *rest: Any) -> Any:
        traced = make(tracer, func, to_func, *rest)
        compares = func in (operator.is_, operator.is_not)  # during a trace class names refer to stand-ins

        @functools.wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if to_func and tracer.temp_disable_call:
                return to_func(*args, **kwargs)
            if compares:
                classes = {id(stand_in): cls for stand_in, cls in tracer.clz_wrapper_map.items()}
                args = tuple(classes.get(id(arg), arg) for arg in args)
            return traced(*args, **kwargs)

        return wrapper

    concrete_tracer._create_wrapped_leaf_func = make_wrapper
    return True


def _typed(make: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Wrap a function that makes stand-ins, so that these take a subscript and ``|``."""

    @functools.wraps(make)
    def make_typed(tracer: Any, cls: Any) -> Any:
        stand_in = make(tracer, cls)
        kind: Any = type(stand_in)
        kind.__getitem__ = lambda _, parameters: cls[parameters]
        kind.__or__ = lambda _, other: cls | other
        kind.__ror__ = lambda _, other: other | cls
        return stand_in

    return make_typed


def _place(table: dict[Any, tuple[list[tuple[Any, str]], bool, Any]], function: Any) -> None:
    """Add ``torch.Tensor`` to the positions of one entry of the tracer's table, or drop the entry."""
    if not isinstance(function, MethodDescriptorType):
        del table[function]
        return
    positions, forced, replacement = table[function]
    public = getattr(torch.Tensor, function.__name__)
    if public is function:
        table[function] = ([*positions, (torch.Tensor, function.__name__)], forced, replacement)
    else:
        del table[function]
        table.setdefault(public, (list(positions), forced, replacement))


@lru_cache(maxsize=512)
def code_units(code: CodeType) -> tuple[dis.Instruction, ...]:
    """List the instruction at each code unit (two bytes) of a code object, ``len(co_code) // 2`` of them."""
    # code_units(code)[frame.f_lasti // 2] is the running instruction. A unit that is only part of an instruction gets
    # the following instruction: inline caches (since Python 3.11), EXTENDED_ARG, and since 3.13 TO_BOOL and comparisons
    # that end in a truth test, which earlier versions did in the jump or `not` that follows.
    units: list[dis.Instruction] = []
    # counted here, because during a trace len() is NNI's and iterates over its argument
    filled = 0
    for instruction in dis.get_instructions(code):
        # since Python 3.13 a comparison that calls bool() on its result is shown as bool(<)
        leads_to_the_next = instruction.opname in ("EXTENDED_ARG", "TO_BOOL") or instruction.argrepr.startswith("bool(")
        if not leads_to_the_next:
            following = instruction.offset // 2 + 1
            units += [instruction] * (following - filled)
            filled = following
    units += units[-1:] * (len(code.co_code) // 2 - filled)
    return (*units,)


def index_code_units() -> bool:
    """Let the tracer's proxies find the instruction that is running.

    Place: ``nni/common/concrete_trace_utils/concrete_proxy.py``, ``ConcreteProxy.__iter__``, ``__len__``, ``__bool__``
    and ``keys``. Cause: they use an instruction's offset in code units as its index. Since Python 3.11 inline caches
    occupy units that ``dis`` doesn't list; 3.13 tests for truth before the jump.
    """
    sample = restore_branch_opcodes.__code__
    if len(list(concrete_proxy.dis.get_instructions(sample))) == len(sample.co_code) // 2:
        return False
    concrete_proxy.dis = SimpleNamespace(**{**vars(dis), "get_instructions": code_units})
    return True


def restore_branch_opcodes() -> bool:
    """Let the tracer's proxies know all instructions that branch on a truth value.

    Place: ``nni/common/concrete_trace_utils/concrete_proxy.py``, ``ConcreteProxy.jump_opcodes``. Cause: it lists five
    names; Python 3.11 has others.
    """
    known = concrete_proxy.ConcreteProxy.jump_opcodes
    missing = []
    for name, opcode in dis.opmap.items():
        branches = name.startswith(("JUMP_IF_", "POP_JUMP_")) and ("_IF_TRUE" in name or "_IF_FALSE" in name)
        if branches and opcode not in known:
            missing.append(opcode)
    concrete_proxy.ConcreteProxy.jump_opcodes = (*known, *missing)
    return bool(missing)
