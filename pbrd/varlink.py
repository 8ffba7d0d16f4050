"""The Varlink wire format, without I/O: messages, the errors of a call, what an interface declares.

A message is a JSON object and a NUL (https://varlink.org/Method-Call). The server (`control`) and the
client (`client`) share this room, so it imports nothing that would slow down `pbrd status`.
"""

import json
import re
from typing import Any, NamedTuple

from pbrd.errors import ControlError

Object = dict[str, Any]  # a JSON object

INTERFACE = "io.pbrd.Daemon"
SERVICE = "org.varlink.service"
SOCKET = "pbrd.sock"  # name in the runtime directory
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "object": dict,
    "[]": list,
    "[string]": dict,
}


class CallError(ControlError):
    """A call that is answered by a Varlink error; `str()` is for people.

    `error` is the full name, as in "io.pbrd.Daemon.Failed"; `parameters` go over the wire.
    """

    def __init__(self, error: str, message: str, parameters: Object | None = None) -> None:
        super().__init__(message)
        self.error = error
        self.parameters: Object = {"message": message} if parameters is None else parameters


class Failed(CallError):
    """The daemon could not do it."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{INTERFACE}.Failed", message)


class BadMessage(CallError):
    """Not a Varlink message; the connection is closed after the answer."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{INTERFACE}.BadMessage", message)


class Busy(CallError):
    """Too many clients at once."""

    def __init__(self, message: str = "too many clients; try again") -> None:
        super().__init__(f"{INTERFACE}.Busy", message)


class ConfigInvalid(CallError):
    """A config that was refused; the running one stays. `problems` are lines for people."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        message = "the config is invalid"
        super().__init__(f"{INTERFACE}.ConfigInvalid", message, {"message": message, "problems": [*problems]})
        self.problems = problems


class PermissionDenied(CallError):
    """Only root may ask for this."""

    def __init__(self) -> None:
        super().__init__(f"{SERVICE}.PermissionDenied", "permission denied: only root may do this", {})


class InvalidParameter(CallError):
    """A parameter that the method does not take, or of another type."""

    def __init__(self, parameter: str) -> None:
        text = f"invalid parameter {parameter!r}"
        super().__init__(f"{SERVICE}.InvalidParameter", text, {"parameter": parameter})


class InterfaceNotFound(CallError):
    """No such interface here."""

    def __init__(self, interface: str) -> None:
        text = f"the daemon has no interface {interface!r}"
        super().__init__(f"{SERVICE}.InterfaceNotFound", text, {"interface": interface})


class MethodNotFound(CallError):
    """No such method; a daemon of another version, perhaps."""

    def __init__(self, method: str) -> None:
        text = f"the daemon has no method {method!r}"
        super().__init__(f"{SERVICE}.MethodNotFound", text, {"method": method})


class Request(NamedTuple):
    """One call: the full name of the method and what it was given."""

    method: str
    parameters: Object
    oneway: bool
    more: bool = False


def encode(message: Object) -> bytes:
    """Return the bytes of a message, NUL included; ValueError or TypeError if it is not JSON (NaN is not)."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\0"


def decode(data: bytes) -> Object:
    """Return the object in `data`, a message without its NUL; raises BadMessage."""
    try:
        # From text, not from bytes: json would guess at UTF-16 and UTF-32.
        value = json.loads(data.decode(), parse_constant=_not_json)
    except RecursionError:
        raise BadMessage("not a varlink message: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an int of thousands of digits
        raise BadMessage(f"not a varlink message: {error}") from None
    if not isinstance(value, dict):
        raise BadMessage("not a varlink message: a JSON object is wanted")
    return value


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def request(data: bytes) -> Request:
    """Return the call in `data`; raises BadMessage, and InvalidParameter for an upgrade."""
    message = decode(data)
    method, parameters = message.get("method"), message.get("parameters")
    if not isinstance(method, str):
        raise BadMessage('not a varlink call: "method" is missing')
    if parameters is None:  # absent and null are the same in Varlink
        parameters = {}
    if not isinstance(parameters, dict):
        raise BadMessage('not a varlink call: "parameters" is not an object')
    if message.get("upgrade"):
        raise InvalidParameter("upgrade")
    return Request(method, parameters, message.get("oneway") is True, message.get("more") is True)


def reply(parameters: Object, *, continues: bool = False) -> bytes:
    """Return the bytes of a successful answer; `continues`: others follow to the same call."""
    return encode({"parameters": parameters} | ({"continues": True} if continues else {}))


def error_reply(error: CallError) -> bytes:
    """Return the bytes of an error."""
    return encode({"error": error.error, "parameters": error.parameters})


def result(data: bytes) -> Object:
    """Return the parameters of the answer in `data`; raises the CallError that it stands for."""
    message = decode(data)
    parameters = message.get("parameters") or {}
    error = message.get("error")
    if error is None:
        return dict(parameters)
    if error == f"{INTERFACE}.ConfigInvalid":
        raise ConfigInvalid(tuple(str(problem) for problem in parameters.get("problems", ())))
    if error == f"{SERVICE}.PermissionDenied":
        raise PermissionDenied
    if error == f"{SERVICE}.MethodNotFound":
        raise MethodNotFound(str(parameters.get("method")))
    if error == f"{SERVICE}.InvalidParameter":
        raise InvalidParameter(str(parameters.get("parameter")))
    raise CallError(str(error), str(parameters.get("message", error)), parameters)


def methods(description: str) -> dict[str, dict[str, str]]:
    """Return what an interface description declares: method → parameter → type ("?string", "[]string")."""
    text = re.sub(r"#[^\n]*", "", description)
    return {
        name: dict(re.findall(r"(\w+)\s*:\s*([^,\s]+)", parameters))
        for name, parameters in re.findall(r"\bmethod\s+(\w+)\s*\(([^()]*)\)\s*->", text)
    }


def check(declared: dict[str, str], given: Object) -> Object:
    """Return `given` without nulls; raises InvalidParameter for what `declared` does not allow."""
    parameters = {name: value for name, value in given.items() if value is not None}
    for name, value in parameters.items():
        if name not in declared or not _is(declared[name], value):
            raise InvalidParameter(name)
    for name, type_ in declared.items():
        if not type_.startswith("?") and name not in parameters:
            raise InvalidParameter(name)
    return parameters


def _is(type_: str, value: object) -> bool:
    type_ = type_.removeprefix("?")
    for prefix in ("[]", "[string]"):
        if type_.startswith(prefix):
            if not isinstance(value, TYPES[prefix]):
                return False
            items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
            return all(_is(type_.removeprefix(prefix), item) for item in items)
    if isinstance(value, bool):  # an int to Python, but not to Varlink
        return type_ == "bool"
    return isinstance(value, TYPES.get(type_, ()))
