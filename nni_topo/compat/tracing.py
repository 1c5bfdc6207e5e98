"""Patches of NNI's concrete tracer: what it wraps, and how it asks whether a node is pure."""

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
    AttributeError at a static builtin. Methods get the place that NNI would have given them, one that ``torch.Tensor``
    overrides in Python is listed by that override, as NNI does; static builtins are dropped.
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

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``node_is_impure_wrapper(node)``. Cause: it stands in
    for ``torch.fx.Node.is_impure``, which takes ``impure_random`` as well, so that every trace ended in a TypeError.
    NNI's rule, under which a random operation without users is dead, stays as it is.
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
    compiles a traced function again while ``list`` and ``dict`` are stand-ins that take no subscript: a TypeError. The
    second compilation leaves annotations alone; nothing reads them there.
    """
    if "compile" in vars(operator_patcher):
        return False
    operator_patcher.compile = functools.partial(compile, flags=__future__.annotations.compiler_flag)
    return True


def name_class_of_super() -> bool:
    """Let ``super()`` in a traced method mean the class that defines the method.

    Place: ``nni/common/concrete_trace_utils/operator_patcher.py``, ``TransformerOp.visit_Call``. Cause: it writes
    ``super(self.__class__, self)``, so that a method inherited by a subclass calls itself: a RecursionError.
    """
    _, tree = operator_patcher.TransformerOp().visit_start(ast.parse("super()"))
    if "self.__class__" not in ast.unparse(tree):
        return False

    rewrite = operator_patcher.TransformerOp.visit_Call

    def visit_call(self: ast.NodeTransformer, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            # a method that says super() has __class__ among its free variables, which NNI makes globals
            names = [ast.Name(id=name, ctx=ast.Load()) for name in ("__class__", "self")]
            return ast.Call(func=node.func, args=[*names], keywords=[])
        rewritten: ast.AST = rewrite(self, node)
        return rewritten

    operator_patcher.TransformerOp.visit_Call = visit_call
    return True


def run_leaves_with_classes() -> bool:
    """Let functions and modules that aren't traced into find Python's classes, and no stand-ins.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``ConcreteTracer.run_target``. Cause: while a model
    is traced, ``list``, ``bool``, ``type`` and others are objects that look like the classes. PyTorch's own functions
    found them too, as in every max pooling without a stride and every unpooling: a TypeError or an AssertionError.
    """
    tracer = concrete_tracer.ConcreteTracer
    run = tracer.run_target
    if run.__module__ == __name__ or "clz_wrapper_map" not in tracer.trace.__code__.co_names:
        return False

    def run_target(self: Any, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # before the first stand-in is made, placeholders are run without any
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
    """Leave ``torch.autograd.Function.apply`` where it was, once a trace is over.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, the end of ``ConcreteTracer.trace``. Cause: it
    deletes the method, which an old PyTorch inherited from C. It is Python's own now, so that after the first trace no
    function with a gradient of its own ran under ``torch.func``; before PyTorch 2.14 no decoder of Transformers ran
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
    """Let the stand-ins of builtin classes be written as types: ``list[int]``, ``int | None``.

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
    """Let ``type(value) is tuple`` be true of a tuple, and PyTorch's functions call those that they mean.

    Place: ``nni/common/concrete_trace_utils/concrete_tracer.py``, ``_create_wrapped_leaf_func``. Cause: ``type`` gives
    the class, while the name ``tuple`` means the class's stand-in: models that check a type so (DistilBERT) raised
    their own errors. And ``torch.norm`` and others of ``torch.functional`` are replaced by a wrapper, which calls the
    builtin of that name from PyTorch's code: it takes other arguments, so that ``normalize``, ``mse_loss`` and others
    ended in a TypeError.
    """
    make = concrete_tracer._create_wrapped_leaf_func
    if make(SimpleNamespace(temp_disable_call=True), lambda: False, lambda: True)():
        return False

    def make_wrapper(tracer: Any, func: Callable[..., Any], to_func: Callable[..., Any] | None, *rest: Any) -> Any:
        traced = make(tracer, func, to_func, *rest)
        compares = func in (operator.is_, operator.is_not)  # during a trace these names mean others

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
    """Let stand-ins be written as types."""

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
    """Give one entry of the tracer's table its position on ``torch.Tensor``, or drop it."""
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
    """List the instruction that counts at every code unit (two bytes) of a code object, ``len(co_code) // 2``."""
    # A unit that is only part of an instruction holds the next one: the inline caches that follow most instructions
    # since Python 3.11, EXTENDED_ARG, and from 3.13 on TO_BOOL and the comparisons that end in a truth test, which used
    # to be a part of the jump or the `not` after it. So code_units(code)[frame.f_lasti // 2] is the running
    # instruction.
    units: list[dis.Instruction] = []
    # counted by hand: during a trace len() is NNI's, and walks through what it is given
    filled = 0
    for instruction in dis.get_instructions(code):
        # Python 3.13 and newer show a comparison that calls bool() on its result as bool(<)
        leads_to_the_next = instruction.opname in ("EXTENDED_ARG", "TO_BOOL") or instruction.argrepr.startswith("bool(")
        if not leads_to_the_next:
            following = instruction.offset // 2 + 1
            units += [instruction] * (following - filled)
            filled = following
    units += units[-1:] * (len(code.co_code) // 2 - filled)
    return (*units,)


def index_code_units() -> bool:
    """Let the traced values find the instruction that is running.

    Place: ``nni/common/concrete_trace_utils/concrete_proxy.py``, ``ConcreteProxy.__iter__``, ``__len__``, ``__bool__``
    and ``keys``. Cause: they take an instruction's index to be its offset in code units. Since Python 3.11 inline
    caches take units that ``dis`` doesn't list; 3.13 tests for truth before the jump.
    """
    sample = restore_branch_opcodes.__code__
    if len(list(concrete_proxy.dis.get_instructions(sample))) == len(sample.co_code) // 2:
        return False
    concrete_proxy.dis = SimpleNamespace(**{**vars(dis), "get_instructions": code_units})
    return True


def restore_branch_opcodes() -> bool:
    """Let the traced values know all instructions that branch on a truth value.

    Place: ``nni/common/concrete_trace_utils/concrete_proxy.py``, ``ConcreteProxy.jump_opcodes``. Cause: a list of five
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
