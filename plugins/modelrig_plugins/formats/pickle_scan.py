"""What the pickle in a checkpoint says, without running it: a small interpreter of the opcodes that tensors are described with.

Python's own unpickler calls whatever the pickle names. This one calls nothing: a global is a word of a closed list, and what a
list, tuple, dict or call makes is plain data. Work and memory are in proportion to the bytes of the pickle, whatever it says:
no number in it decides how much is allocated.
"""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import Any

from attrs import define, field

from modelrig.errors import FormatError, quoted
from modelrig_plugins.formats.pickle_words import GLOBALS, Global, Refusal, storage_of, told

MAX_MARKS = 1000  # collections being put together, one within the other
BYTES_PER_CONTAINER = 8  # what torch.save writes has twelve and more; each takes about 60 in memory
FREE_CONTAINERS = 1000
MAX_NUMBER_BYTES = 8
MAX_GLOBAL_BYTES = 1024
OF_A_SUBCLASS = ("torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_wrapper_subclass")
KEYS = frozenset({str, int})  # of these alone a hash is taken: that of a tuple may go as deep as the file wants


#: opcodes that are known and refused → name; the others are not Python's, or not of protocol 2
REFUSED = {
    0x30: "POP", 0x31: "POP_MARK", 0x32: "DUP", 0x42: "BINBYTES", 0x43: "SHORT_BINBYTES", 0x46: "FLOAT", 0x49: "INT",
    0x4C: "LONG", 0x50: "PERSID", 0x53: "STRING", 0x56: "UNICODE", 0x64: "DICT", 0x67: "GET", 0x69: "INST", 0x6C: "LIST",
    0x6F: "OBJ", 0x70: "PUT", 0x81: "NEWOBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8B: "LONG4", 0x8C: "SHORT_BINUNICODE",
    0x8D: "BINUNICODE8", 0x8E: "BINBYTES8", 0x8F: "EMPTY_SET", 0x90: "ADDITEMS", 0x91: "FROZENSET", 0x92: "NEWOBJ_EX",
    0x93: "STACK_GLOBAL", 0x94: "MEMOIZE", 0x95: "FRAME", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
_INT4, _UINT2, _UINT4, _FLOAT8 = struct.Struct("<i"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct(">d")


def scan(data: bytes, path: Path) -> Any:
    """What the pickle `data` of the file `path` describes: dicts, lists, tuples, strings, numbers, `StoredView`, `Unsupported`.

    Raises:
        FormatError: PK-GLOBAL, PK-OPCODE, PK-REDUCE, PK-KEY, PK-LIMIT, PK-TRUNC, PK-BAD; the locus is the name being described.
    """
    machine = _Machine(data, path)
    try:
        return machine.run()
    except Refusal as refusal:
        raise machine.problem(refusal.code, refusal.reason) from refusal
    except (IndexError, struct.error) as error:
        if isinstance(error, struct.error) or machine.at >= len(data) - 1:
            raise machine.problem("PK-TRUNC", "the pickle ends within an opcode, or before the last") from error
        raise machine.problem("PK-BAD", "an opcode takes what is not there") from error
    except UnicodeDecodeError as error:
        raise machine.problem("PK-BAD", "a string is not UTF-8") from error


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise Refusal("PK-BAD", f"keys and values are set of {told(target)}")
    keys = items[::2]
    if not KEYS.issuperset(map(type, keys)):
        raise Refusal("PK-KEY", f"a key is {told(next(key for key in keys if type(key) not in KEYS))}; names are strings")
    fresh = dict(zip(keys, items[1::2], strict=True))
    if len(fresh) != len(keys) or not target.keys().isdisjoint(fresh):
        twice = next(key for key, count in Counter([*keys, *(target.keys() & fresh.keys())]).items() if count > 1)
        raise Refusal("PK-KEY", f"the key {quoted(twice)} is there twice")
    target.update(fresh)


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise Refusal("PK-BAD", f"something is appended to {told(value)}")
    return value


@define
class _Machine:
    data: bytes
    path: Path
    at: int = 0  # the opcode being run
    stack: list[Any] = field(factory=list)
    marks: list[list[Any]] = field(factory=list)  # the stacks below

    def problem(self, code: str, reason: str) -> FormatError:
        where = f"{reason} (opcode {self.data[self.at : self.at + 1].hex() or 'none'} at byte {self.at:,} of data.pkl)"
        return FormatError(code, where, path=self.path, locus=self.described())

    def described(self) -> str | None:
        """The name whose value is being put together: the last key, from the outermost dict inwards through dicts alone."""
        name = None
        for stack in (*self.marks, self.stack):
            keys = [item for item in stack[-3:] if type(item) is str]
            name = keys[-1] if keys else name
            if stack and type(stack[-1]) is not dict:
                break
        return name

    def find(self, words: bytes) -> Global:
        """The global of these words, "module name". The only thing looked up by a string of the file, in the closed list."""
        found = GLOBALS.get(words)
        if found is not None:
            return found
        name = words.decode("utf-8", "replace").replace(" ", ".")
        calls = [item.name for stack in (*self.marks[-1:], self.stack) for item in stack[-4:] if type(item) is Global]
        if any(call in OF_A_SUBCLASS for call in calls):
            raise Refusal("PK-LAYOUT", f"a tensor of the subclass {quoted(name)}, which is no plain tensor")
        raise Refusal("PK-GLOBAL", f"the pickle names {quoted(name)}, which is nothing tensors are made of; nothing was run")

    def run(self) -> Any:
        """One branch for each opcode, the frequent ones first."""
        data, stack, marks = self.data, self.stack, self.marks
        memo: list[Any] = []
        room = FREE_CONTAINERS + len(data) // BYTES_PER_CONTAINER
        too_many = Refusal("PK-LIMIT", f"more than {room:,} lists, tuples, dicts and calls in {len(data):,} bytes")
        at = next_ = 0
        try:
            while True:
                at = next_
                op = data[at]
                next_ = at + 1
                if op == 0x72 or op == 0x71:  # LONG_BINPUT, BINPUT
                    if op == 0x72:
                        (index,) = _UINT4.unpack_from(data, next_)
                        next_ += 4
                    else:
                        index = data[next_]
                        next_ += 1
                    if index == len(memo):
                        memo.append(stack[-1])
                    elif index < len(memo):
                        memo[index] = stack[-1]
                    else:
                        raise Refusal("PK-LIMIT", f"memo {index:,} is written when there are {len(memo):,}")
                elif op == 0x68:  # BINGET
                    stack.append(memo[data[next_]])
                    next_ += 1
                elif op == 0x4B:  # BININT1
                    stack.append(data[next_])
                    next_ += 1
                elif op == 0x28:  # MARK
                    if len(marks) >= MAX_MARKS:
                        raise Refusal("PK-LIMIT", f"collections are nested more than {MAX_MARKS:,} deep")
                    marks.append(stack)
                    stack = []
                elif op == 0x58:  # BINUNICODE
                    (length,) = _UINT4.unpack_from(data, next_)
                    next_ += 4
                    if length > len(data) - next_:
                        raise Refusal("PK-TRUNC", f"a string of {length:,} bytes begins where {len(data) - next_:,} are left")
                    stack.append(data[next_ : next_ + length].decode())
                    next_ += length
                elif op == 0x85:  # TUPLE1
                    room -= 1
                    if room < 0:
                        raise too_many
                    stack[-1] = (stack[-1],)
                elif op == 0x86:  # TUPLE2
                    room -= 1
                    if room < 0:
                        raise too_many
                    last = stack.pop()
                    stack[-1] = (stack[-1], last)
                elif op == 0x87:  # TUPLE3
                    room -= 1
                    if room < 0:
                        raise too_many
                    last, middle = stack.pop(), stack.pop()
                    stack[-1] = (stack[-1], middle, last)
                elif op == 0x74:  # TUPLE
                    room -= 1
                    if room < 0:
                        raise too_many
                    items, stack = stack, marks.pop()
                    stack.append(tuple(items))
                elif op == 0x52:  # REDUCE
                    arguments, function = stack.pop(), stack[-1]
                    if type(function) is not Global or function.make is None or type(arguments) is not tuple:
                        raise Refusal("PK-REDUCE", f"a call of {told(function)}")
                    room -= 1
                    if room < 0:
                        raise too_many
                    stack[-1] = function.make(arguments)
                elif op == 0x51:  # BINPERSID
                    room -= 1
                    if room < 0:
                        raise too_many
                    stack[-1] = storage_of(stack[-1])
                elif op == 0x4D:  # BININT2
                    stack.append(_UINT2.unpack_from(data, next_)[0])
                    next_ += 2
                elif op == 0x4A:  # BININT
                    stack.append(_INT4.unpack_from(data, next_)[0])
                    next_ += 4
                elif op == 0x89 or op == 0x88:  # NEWFALSE, NEWTRUE
                    stack.append(op == 0x88)
                elif op == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                elif op == 0x6A:  # LONG_BINGET
                    stack.append(memo[_UINT4.unpack_from(data, next_)[0]])
                    next_ += 4
                elif op == 0x63:  # GLOBAL
                    module, _, rest = data[next_ : next_ + MAX_GLOBAL_BYTES].partition(b"\n")
                    name, newline, _ = rest.partition(b"\n")
                    if not newline:
                        raise Refusal("PK-TRUNC", f"a global that does not end within {MAX_GLOBAL_BYTES} bytes")
                    stack.append(self.find(module + b" " + name))
                    next_ += len(module) + len(name) + 2
                elif op == 0x75:  # SETITEMS
                    items, stack = stack, marks.pop()
                    _set_items(stack[-1], items)
                elif op == 0x73:  # SETITEM
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                elif op == 0x7D:  # EMPTY_DICT
                    room -= 1
                    if room < 0:
                        raise too_many
                    stack.append({})
                elif op == 0x5D:  # EMPTY_LIST
                    room -= 1
                    if room < 0:
                        raise too_many
                    stack.append([])
                elif op == 0x61:  # APPEND
                    value = stack.pop()
                    _list(stack[-1]).append(value)
                elif op == 0x65:  # APPENDS
                    items, stack = stack, marks.pop()
                    _list(stack[-1]).extend(items)
                elif op == 0x4E:  # NONE
                    stack.append(None)
                elif op == 0x8A:  # LONG1
                    length = data[next_]
                    next_ += 1
                    if length > MAX_NUMBER_BYTES or length > len(data) - next_:
                        raise Refusal("PK-LIMIT", f"a number of {length} bytes; at most {MAX_NUMBER_BYTES} are accepted")
                    stack.append(int.from_bytes(data[next_ : next_ + length], "little", signed=True))
                    next_ += length
                elif op == 0x47:  # BINFLOAT
                    stack.append(_FLOAT8.unpack_from(data, next_)[0])
                    next_ += 8
                elif op == 0x62:  # BUILD: attributes of a dict, such as the versions of a state_dict's modules
                    state = stack.pop()
                    if type(stack[-1]) is not dict or type(state) not in (dict, tuple):
                        raise Refusal("PK-REDUCE", f"attributes are given to {told(stack[-1])}")
                elif op == 0x55 or op == 0x54:  # SHORT_BINSTRING, BINSTRING
                    length, next_ = (data[next_], next_ + 1) if op == 0x55 else (_INT4.unpack_from(data, next_)[0], next_ + 4)
                    if not 0 <= length <= len(data) - next_:
                        raise Refusal("PK-TRUNC", f"a string of {length:,} bytes begins where {len(data) - next_:,} are left")
                    stack.append(data[next_ : next_ + length].decode())
                    next_ += length
                elif op == 0x80:  # PROTO
                    if data[next_] != 2 or at:
                        raise Refusal("PK-OPCODE", f"pickle protocol {data[next_]}; torch.save writes 2")
                    next_ += 1
                elif op == 0x2E:  # STOP
                    if next_ != len(data):
                        raise Refusal("PK-BAD", f"{len(data) - next_:,} bytes follow the last opcode")
                    if len(stack) != 1 or marks:
                        raise Refusal("PK-BAD", "something is left that belongs to nothing")
                    return stack.pop()
                else:
                    raise Refusal("PK-OPCODE", f"the opcode {REFUSED.get(op, 'of no name')} is not among those torch.save writes")
        finally:  # for the message, if there is one
            self.at, self.stack = at, stack
