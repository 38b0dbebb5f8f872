"""The Lambda endpoint: it moves bytes between API Gateway and fraud_pkg.serve.service, and logs one line a request."""

import gc
import logging
import os
import time
from functools import cache
from pathlib import Path

from chalice import Chalice, Response

app = Chalice(app_name="fraud")
ROUTES = {
    "/predict": "POST",
    "/predict/batch": "POST",
    "/feedback": "POST",
    "/model": "GET",
    "/healthz": "GET",
    "/readyz": "GET",
}


@cache
def opened():
    """The service and its watcher; made once for an instance."""
    gc.disable()  # nothing of what is imported is garbage
    from fraud_pkg.core.errors import SettingsError
    from fraud_pkg.core.heap import freeze_heap
    from fraud_pkg.core.settings import load_settings
    from fraud_pkg.serve.logs import log_json_lines
    from fraud_pkg.serve.reload import open_service

    log_json_lines()
    settings = load_settings(file=Path(__file__).with_name("settings.ini"))
    if settings.audit.url or settings.audit.required:
        raise SettingsError(
            "[audit]: Lambda keeps no audit log (docs/decisions/audit.md); expected url empty, required no"
        )
    service, watcher = open_service(settings, os.environ, public=True)
    watcher.check()
    freeze_heap()
    return service, watcher


@app.middleware("http")
def answer(request, _):
    """Answers before Chalice looks at content type or body, so that the answers are those of the FastAPI endpoint."""
    from fraud_pkg.serve.logs import cloudwatch, request_fields

    service, watcher = opened()
    watcher.check_if_due()
    began = time.perf_counter()
    result = service.answer(request.method, request.path, request.headers, request.raw_body)
    seconds = time.perf_counter() - began
    fields = request_fields(request.method, request.path, result, seconds)
    fields["request_id"] = request.lambda_context.aws_request_id
    logging.getLogger("fraud_pkg").info("request", extra={"fields": cloudwatch(fields, time.time())})
    headers = {"Content-Type": "application/json"}
    return Response(result.body.decode(), status_code=result.status, headers=headers)


def route():
    """Never runs: the routes are declared for API Gateway, and `answer` comes before them."""


for path, method in ROUTES.items():
    app.route(path, methods=[method])(route)

if "AWS_CHALICE_CLI_MODE" not in os.environ:  # the chalice command imports this for the routes alone
    opened()
