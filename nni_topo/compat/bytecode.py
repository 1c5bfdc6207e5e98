"""Mends of NNI's traced values, which look at their caller's bytecode to learn what is being done with them.

``ConcreteProxy.__bool__`` has to return a real bool in a branch, ``__iter__`` single elements in an
unpacking, and so on. They find the instruction that is running as
``list(dis.get_instructions(code))[frame.f_lasti // 2]`` and look one entry further.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType, SimpleNamespace

from nni.common.concrete_trace_utils import concrete_proxy


@lru_cache(maxsize=512)
def code_units(code: CodeType) -> tuple[dis.Instruction, ...]:
    """List the instruction that counts at every code unit (two bytes) of a code object.

    A unit that starts an instruction holds it. A unit that is only part of one holds the next instruction:
    the inline caches that follow most instructions since Python 3.11, ``EXTENDED_ARG``, and from 3.13 on
    ``TO_BOOL`` and the comparisons that end in a truth test, which used to be a part of the jump or the
    ``not`` behind it.

    Parameters
    ----------
    code : CodeType
        A function's or module's code.

    Returns
    -------
    tuple of dis.Instruction
        ``len(code.co_code) // 2`` entries, so that ``code_units(code)[frame.f_lasti // 2]`` is the running
        instruction.
    """
    units: list[dis.Instruction] = []
    # counted by hand: during a trace len() is NNI's, and walks through what it is given
    filled = 0
    for instruction in dis.get_instructions(code):
        if not _leads_to_the_next(instruction):
            following = instruction.offset // 2 + 1
            units += [instruction] * (following - filled)
            filled = following
    units += units[-1:] * (len(code.co_code) // 2 - filled)
    return (*units,)


def _leads_to_the_next(instruction: dis.Instruction) -> bool:
    # Python 3.13 and newer show a comparison that calls bool() on its result as bool(<)
    return instruction.opname in ("EXTENDED_ARG", "TO_BOOL") or instruction.argrepr.startswith("bool(")


def index_code_units() -> bool:
    """Let the traced values find the instruction that is running.

    Place: ``nni/common/concrete_trace_utils/concrete_proxy.py``, ``ConcreteProxy.__iter__``, ``__len__``,
    ``__bool__`` and ``keys``. Cause: they take an instruction's index to be its offset in code units. Since
    Python 3.11 inline caches take units that ``dis`` doesn't list, so a wrong instruction, or none, was
    found (any PyTorch). Python 3.13 tests for truth before the jump, in ``TO_BOOL`` or in the comparison.

    Returns
    -------
    bool
        True if NNI's view of ``dis`` was replaced, False if it lists one entry per code unit.
    """
    sample = restore_branch_opcodes.__code__
    if len(list(concrete_proxy.dis.get_instructions(sample))) == len(sample.co_code) // 2:
        return False
    concrete_proxy.dis = SimpleNamespace(**{**vars(dis), "get_instructions": code_units})
    return True


def restore_branch_opcodes() -> bool:
    """Let the traced values know all instructions that branch on a truth value.

    Place: ``nni/common/concrete_trace_utils/concrete_proxy.py``, ``ConcreteProxy.jump_opcodes``. Cause: a
    list of five names. Python 3.11 has ``POP_JUMP_FORWARD_IF_TRUE``, ``POP_JUMP_BACKWARD_IF_FALSE`` and so
    on instead (any PyTorch); 3.10 and 3.12 to 3.13 use listed names.

    Returns
    -------
    bool
        True if opcodes were added, False if all were known.
    """
    known = concrete_proxy.ConcreteProxy.jump_opcodes
    missing = tuple(opcode for name, opcode in dis.opmap.items() if _branches_on_truth(name) and opcode not in known)
    concrete_proxy.ConcreteProxy.jump_opcodes = known + missing
    return bool(missing)


def _branches_on_truth(name: str) -> bool:
    return name.startswith(("JUMP_IF_", "POP_JUMP_")) and any(word in name for word in ("_IF_TRUE", "_IF_FALSE"))
