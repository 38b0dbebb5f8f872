"""The Lambda twin: it moves bytes between API Gateway and fraud_pkg.serve.scorer, and logs one line for each request."""

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
def doors():
    """The service and its watcher; made once for an instance."""
    from fraud_pkg.serve.logs import log_json_lines
    from fraud_pkg.serve.reload import open_service
    from fraud_pkg.core.settings import load_settings

    log_json_lines()
    service, watcher = open_service(
        load_settings(file=Path(__file__).with_name("settings.ini")), os.environ, public=True
    )
    watcher.look()
    return service, watcher


@app.middleware("http")
def answer(request, _):
    """Answers every request, before Chalice looks at its content type or its body: the answers are those of the other door."""
    from fraud_pkg.serve.logs import cloudwatch, request_fields

    service, watcher = doors()
    watcher.look_if_due()
    began = time.perf_counter()
    found = service.answer(request.method, request.path, request.headers, request.raw_body)
    fields = request_fields(request.method, request.path, found, time.perf_counter() - began) | {
        "request_id": request.lambda_context.aws_request_id
    }
    logging.getLogger("fraud_pkg").info("request", extra={"fields": cloudwatch(fields, time.time())})
    return Response(found.body.decode(), status_code=found.status, headers={"Content-Type": "application/json"})


def route():
    """Never runs: the routes are declared for API Gateway, and `answer` comes before them."""


for path, method in ROUTES.items():
    app.route(path, methods=[method])(route)

if "AWS_CHALICE_CLI_MODE" not in os.environ:  # the chalice command imports this for the routes alone
    doors()
