"""MLflow: the only package that imports it.

``tracker`` says what happens in a sweep; ``outbox`` sends it in a thread of its own, and ``runs``
writes it there; ``pages`` looks at what is written.
"""

import logging
import os

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the outbox tries again
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import mlflow  # noqa: F401  (it sets up its loggers)

logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # a locked database is a traceback there
logging.getLogger("alembic").setLevel(logging.ERROR)
