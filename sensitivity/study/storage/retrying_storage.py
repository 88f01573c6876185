"""RetryingStorage: an Optuna storage that retries calls while the connection to its database is lost."""

from __future__ import annotations

import abc
import time
from functools import partialmethod
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError

from sensitivity.spec.errors import UserError, reason

LONGEST_OUTAGE = 300.0  # seconds: a sweep with days of work behind it should survive a restart of its database
RETRY_AFTER = 0.5  # seconds between two attempts


def is_connection_lost(error: BaseException) -> bool:
    """Whether an error means a lost connection, which is retried, rather than a wrong request, which is not."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SQLAlchemyError):
            return not isinstance(cause, IntegrityError | ProgrammingError | DataError)
        cause = cause.__cause__ or cause.__context__
    return False


def _pass_on(storage: type[RetryingStorage]) -> type[RetryingStorage]:
    """Give a class all methods of Optuna's storage interface, including those of later versions: each is retried."""
    for name, value in vars(BaseStorage).items():
        if callable(value) and not name.startswith("_"):
            setattr(storage, name, partialmethod(storage.call, name))
    return abc.update_abstractmethods(storage)


@_pass_on
class RetryingStorage(BaseStorage):
    """Passes each call on to Optuna's storage, with Optuna's cache, and retries it while the connection is lost."""

    def __init__(self, database: RDBStorage) -> None:
        self.database = database
        self._storage = get_storage(database)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the storage, with retries."""
        began = None
        while True:
            try:
                return getattr(self._storage, method)(*args, **kwargs)
            except UpdateFinishedTrialError:
                if began is None:
                    raise
                return True  # the first attempt was carried out, and only its reply was lost: success
            except (StorageInternalError, SQLAlchemyError) as error:
                if not is_connection_lost(error):
                    raise
                began = began or time.monotonic()
                if time.monotonic() - began > LONGEST_OUTAGE:
                    why = f"the database has been away for {LONGEST_OUTAGE:g} seconds ({reason(error)})"
                    raise UserError(f"{why}; the same command continues when it is back") from error
                time.sleep(RETRY_AFTER)
