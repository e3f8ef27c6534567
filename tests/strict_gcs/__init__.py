"""Google Cloud Storage as its documentation describes it, in memory, with faults on demand; for tests.

fake-gcs-server is a real server, but lenient: it takes chunks of any length at any offset, ends an upload when it is
asked how far it has come, and checks neither checksums nor preconditions of resumable uploads. This double checks all
of them, and answers, loses, cuts and corrupts as a test asks. It is no proof that Google does the same.
"""

from tests.strict_gcs.faults import Fault, Request, at
from tests.strict_gcs.server import StrictGCS
from tests.strict_gcs.using import NAME, NEW, OLD, PART, QUICK, on_store, put_all, save, saved_with

__all__ = [
    "NAME",
    "NEW",
    "OLD",
    "PART",
    "QUICK",
    "Fault",
    "Request",
    "StrictGCS",
    "at",
    "on_store",
    "put_all",
    "save",
    "saved_with",
]
