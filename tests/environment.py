"""A real server as the place where fsspec looks when it is told nothing: what a user's environment does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import fsspec
import pytest
from fsspec.asyn import get_loop
from fsspec.config import conf, set_conf_env

from stress.servers.process import Server

__all__ = ["found_by_environment"]

#: Where fsspec's loop looks up host names; kept for as long as that loop is, and named as its thread is.
_LOOKUPS = ThreadPoolExecutor(thread_name_prefix="fsspecIO")


@contextmanager
def found_by_environment(server: Server) -> Iterator[None]:
    """Let variables and fsspec's configuration name *server* for the time of a block, in this process and its children.

    Args:
        server: From ``tests.servers``.
    """
    loop = get_loop()
    loop.call_soon_threadsafe(loop.set_default_executor, _LOOKUPS)
    settings = copy.deepcopy(conf)
    set_conf_env(settings, dict(server.environment))  # fsspec itself reads variables only as it is imported
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        for protocol, options in settings.items():
            patch.setitem(conf, protocol, options)
        try:
            yield
        finally:
            fsspec.get_filesystem_class(server.protocol).clear_instance_cache()
