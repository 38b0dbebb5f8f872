# The image that decides: the FastAPI twin with the queue of cases, and the stream. Nothing in it trains, installs or compiles. `make image` builds it.
#
# A tag can move. For a build that can be repeated, name the base by its digest:
#   --build-arg PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# pip stays outside the environment that it fills.
RUN python3 -m venv /pip && python3 -m venv --without-pip /app/venv
COPY requirements-serve.lock /
RUN /pip/bin/pip --python /app/venv/bin/python install --no-cache-dir --no-compile --no-deps --only-binary :all: --require-hashes --requirement /requirements-serve.lock
# No tests, no sources in C, of AWS only the services that are called; bytecode that no clock makes stale, because whoever runs the image may not write it.
RUN cd /app/venv/lib/python3*/site-packages \
 && rm -r onnxruntime/tools onnxruntime/transformers onnxruntime/quantization \
 && find . -type d -name tests -prune -exec rm -r {} + \
 && find . -type f \( -name '*.h' -o -name '*.c' -o -name '*.a' -o -name '*.pyx' -o -name '*.pxd' \) -delete \
 && find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name dynamodb ! -name ssm ! -name sts -exec rm -r {} + \
 && /app/venv/bin/python -m compileall -qf --invalidation-mode unchecked-hash /app/venv

# Apart from the libraries: a change in our code is a small layer.
FROM build AS package
COPY fraud_pkg /app/fraud_pkg
RUN /app/venv/bin/python -m compileall -qf --invalidation-mode unchecked-hash /app/fraud_pkg

FROM ${PYTHON_IMAGE}
# A user of its own; no installer and no setuid program of the base stays.
RUN groupadd --gid 10001 fraud \
 && useradd --uid 10001 --gid fraud --no-log-init --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin fraud \
 && install --directory --owner=fraud --group=fraud --mode=0700 /var/lib/fraud \
 && rm -rf /usr/local/lib/python3.*/site-packages/* /usr/local/bin/pip* /usr/local/bin/wheel /usr/lib/python3.*/ensurepip /usr/local/lib/python3.*/ensurepip /usr/share/python-wheels \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /app/venv /app/venv
COPY --from=package /app/fraud_pkg /app/fraud_pkg
COPY settings.ini /app/
# The keys, the store and the champion are the deployment's to name: FRAUD_API_KEYS_FILE, FRAUD_STORE_URL, FRAUD_SERVE_BUNDLE.
# So is the database of cases (FRAUD_CASES_URL): an image has no disk that stays, so without one there are no cases.
# The checker of rules' types is 50 MB: `fraud rules check` and `publish` have asked it before.
# onnxruntime reports to its maker unless it is told not to; pydantic looks through every installed package for plugins.
ENV PATH=/app/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    FRAUD_RULES_CHECK_TYPES=no \
    FRAUD_CASES_URL= \
    FRAUD_CASES_OUTBOX=/var/lib/fraud/cases \
    ORT_DISABLE_TELEMETRY=1 \
    PYDANTIC_DISABLE_PLUGINS=__all__ \
    FRAUD_ROOT=/app \
    FRAUD_SERVE_HOST=0.0.0.0 \
    FRAUD_SERVE_PORT=8000
WORKDIR /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"FRAUD_SERVE_PORT\"]}/healthz', timeout=2)"]
CMD ["python", "-m", "fraud_pkg.serve.server"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fraud-api" \
      org.opencontainers.image.description="Decides on payments before the money moves" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
