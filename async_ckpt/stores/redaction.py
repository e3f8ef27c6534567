"""Hides the secrets in URLs, options and errors of other libraries.

Guarantees: pure; a URL without secrets is not changed. A known secret, from a URL or from ``storage_options``, is
hidden in any text; of unknown ones, everything that looks like a password or a signature in a URL is.

What does not belong here: showing messages. To name a location, use ``Location.url``, which is safe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

__all__ = ["HIDDEN", "presentable", "redacted_text", "redacted_url", "secrets_in"]

HIDDEN = "***"

# Patterns as text: `re` compiles and caches them at their first use, which most programs never make.
# Words in names of parameters, options and connection-string fields whose values are secret.
_SECRET_NAME = (
    r"(?i)(?:^|[^a-z])(?:auth|sig|pass|pwd|key|sas|code|jwt)(?:$|[^a-z])"
    r"|signature|secret|token(?!s)|passw|passphrase|(?:access|account|api|customer|p)key|credential"
    r"|connection.?string|oauth|authori[sz]|authent|cookie|session.?id|upload.?id"
)
# Endings of such names whose values are not secret: where something is, or of what kind.
_NO_SECRET_NAME = r"(?i)[_-](?:ur[il]|file(?:name)?|type|path|version)$"
_NO_SECRETS = frozenset({"anon", "browser", "cache", "cloud", "google_default", "none", "true", "false"})
_NO_SECRET_PARAMETERS = frozenset({"generation", "versionid"})
# Protocols in which text after a "?" is usually a part of the name.
_NAMES_WITH_QUERY = frozenset({"gcs", "gs", "memory", "s3", "s3a"})
# Protocols in which a user without a password is a name or a container, not a token.
_PLAIN_USERS = frozenset({"abfs", "abfss", "az", "ftp", "hdfs", "scp", "sftp", "smb", "ssh", "wasb", "wasbs"})

_SCHEME = r"([A-Za-z][A-Za-z0-9+.\-_]*):/+"
_URL_IN_TEXT = r"[A-Za-z][A-Za-z0-9+.\-_]*:/+[^\s'\"<>`|\\^{}]+"
_PARAMETER = r"([?&;,]?)([\w.\-%]+)=([^&;\s'\"<>,]+)"
_CREDENTIAL = r"(?i)\b(Bearer|Basic|SharedKey|AWS4-HMAC-SHA256)(:? +)[^\s'\"<>]{8,}"
# Not every "::" chains URLs: a password or an IPv6 address may contain one.
_CHAIN = r"::(?=[A-Za-z][A-Za-z0-9+.\-_]*:[:/])"
_LEAST_LENGTH = 3  # of a secret that is looked for in texts: those that are shorter are words


def redacted_url(url: str) -> str:
    """Return *url*, which may be chained, with passwords and signatures hidden; a path is returned unchanged."""
    return "::".join(map(_redacted, re.split(_CHAIN, url)))


def _redacted(url: str) -> str:
    scheme = re.match(_SCHEME, url)
    if scheme is None:
        return url
    start, name = url[: scheme.end()], scheme[1].lower()
    userinfo, rest = _split(url[scheme.end() :])
    path, mark, query = rest.partition("?")
    if mark:
        query = _redacted_query(query, all_of_it=name not in _NAMES_WITH_QUERY)
    return f"{start}{_redacted_user(userinfo, name)}{path}{mark}{query}"


def _split(text: str) -> tuple[str, str]:
    """Split a URL: the part before the host, with its "@", and the other parts."""
    authority, slash, path = text.partition("/")
    userinfo, at, host = authority.rpartition("@")
    if at:
        return userinfo + at, host + slash + path
    _, colon, port = authority.rpartition(":")
    if colon and "@" in path and not port.isdigit() and not authority.endswith("]"):
        # A password with an unquoted slash. Hiding too much is better than too little.
        userinfo, at, rest = text.rpartition("@")
        return userinfo + at, rest
    return "", text


def _redacted_user(userinfo: str, scheme: str) -> str:
    if not userinfo:
        return ""
    user, colon, _ = userinfo.removesuffix("@").partition(":")
    if colon:
        return f"{user}:{HIDDEN}@"
    return userinfo if scheme in _PLAIN_USERS else f"{HIDDEN}@"


def _redacted_query(query: str, *, all_of_it: bool) -> str:
    return "&".join(_redacted_parameter(each, always=all_of_it) for each in query.split("&"))


def _redacted_parameter(parameter: str, *, always: bool) -> str:
    name, equals, value = parameter.partition("=")
    if not equals:
        return HIDDEN if always and name else parameter
    hides = always and name.lower() not in _NO_SECRET_PARAMETERS
    return f"{name}={HIDDEN}" if value and (hides or is_secret(name)) else parameter


def is_secret(name: str) -> bool:
    """Return whether the value of a parameter or an option called *name* is a secret."""
    return re.search(_SECRET_NAME, name) is not None and re.search(_NO_SECRET_NAME, name) is None


def secrets_in(url: str, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return the secrets in *url* and in *options*, in all spellings that may occur, longest first."""
    found: set[str] = set()
    for secret in (*_in_url(url), *_in_options(options or {})):
        stripped = secret.strip()
        if len(stripped) >= _LEAST_LENGTH and stripped.lower() not in _NO_SECRETS:
            found |= {
                stripped,
                unquote(stripped),
                quote(stripped),
                quote(stripped, safe=""),
                repr(stripped)[1:-1],
            }
    return tuple(sorted(found, key=lambda secret: (-len(secret), secret)))


def _in_url(url: str) -> Iterator[str]:
    for link in re.split(_CHAIN, url):
        scheme = re.match(_SCHEME, link)
        if scheme is None:
            continue
        name = scheme[1].lower()
        userinfo, rest = _split(link[scheme.end() :])
        user, colon, password = userinfo.removesuffix("@").partition(":")
        if colon:
            yield password
        elif user and name not in _PLAIN_USERS:
            yield user
        yield from _in_parameters(rest.partition("?")[2], always=name not in _NAMES_WITH_QUERY)


def _in_parameters(text: str, *, always: bool) -> Iterator[str]:
    """Yield the secret values of a query or a connection string."""
    for parameter in re.split("[&;]", text.lstrip("?")):
        name, equals, value = parameter.partition("=")
        if always and not equals:
            yield name
        elif is_secret(name) or (always and name.lower() not in _NO_SECRET_PARAMETERS):
            yield value


def _in_options(options: Mapping[Any, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield from _in_value(value, secret=is_secret(str(name)))


def _in_value(value: Any, *, secret: bool) -> Iterator[str]:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        if secret:
            yield value
            if "=" in value:
                yield from _in_parameters(value, always=False)
        yield from _in_url(value)
    elif isinstance(value, Mapping):
        yield from _in_options(value)
    elif isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], str):  # a header
            secret = secret or is_secret(value[0])
        for each in value:
            yield from _in_value(each, secret=secret)


def redacted_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Return *text* without *secrets*, and without the secrets of any URLs and parameters in it.

    Args:
        text: any text, such as an error message.
        secrets: from ``secrets_in``.
    """
    for secret in secrets:
        # Whole words only: a password may be a part of another word.
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", HIDDEN, text)
    text = re.sub(_URL_IN_TEXT, lambda match: redacted_url(match[0]), text)
    text = re.sub(_CREDENTIAL, rf"\1\2{HIDDEN}", text)
    return re.sub(_PARAMETER, _redacted_match, text)


def _redacted_match(match: re.Match[str]) -> str:
    mark, name, _ = match.groups()
    return f"{mark}{name}={HIDDEN}" if is_secret(name) else match[0]


def presentable(error: BaseException, secrets: Iterable[str] = ()) -> BaseException:
    """Return *error*, or, if its text or a cause's text contains a secret, a copy without it.

    The copy has the same type, attributes and traceback, so that code that handles the error handles the copy as well.
    """
    return _presentable(error, tuple(secrets), {})


def _presentable(
    error: BaseException, secrets: tuple[str, ...], seen: dict[int, BaseException]
) -> BaseException:
    if id(error) in seen:
        return seen[id(error)]
    seen[id(error)] = error
    cause = None if error.__cause__ is None else _presentable(error.__cause__, secrets, seen)
    context = None if error.__context__ is None else _presentable(error.__context__, secrets, seen)
    told = (_told(str, error), _told(repr, error), *getattr(error, "__notes__", ()))
    text, shape, *notes = (redacted_text(each, secrets) for each in told)
    if (text, shape, *notes) == told and cause is error.__cause__ and context is error.__context__:
        return error
    twin = seen[id(error)] = _twin(error, text, shape)
    if notes:
        vars(twin)["__notes__"] = notes
    if isinstance(error, OSError) and isinstance(twin, OSError):
        twin.errno = error.errno
        twin.strerror = None if error.strerror is None else redacted_text(str(error.strerror), secrets)
    twin.__cause__, twin.__context__ = cause, context
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(error.__traceback__)


def _twin(error: BaseException, text: str, shape: str) -> BaseException:
    """Return an exception of the type of *error* whose message is *text*."""
    kind = type(error)
    own = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__str__": lambda _: text,
        "__repr__": lambda _: shape,
    }
    try:
        twin: BaseException = kind.__new__(type(kind.__name__, (kind,), own))
        vars(twin).update(vars(error))
    except Exception:  # a kind that is made in a way of its own
        return Exception(f"{kind.__name__}: {text}")
    return twin


def _told(how: Callable[[object], str], error: BaseException) -> str:
    try:
        return how(error)
    except Exception:
        return type(error).__name__
