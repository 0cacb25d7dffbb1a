# syntax=docker/dockerfile:1
# The operator's server: SuperLink, SuperExec, the sites' endpoint and nginx, as `fedrad-server up` keeps them.
# Build from the repository's root:   docker build -f deploy/docker/server.Dockerfile -t fedrad-server .
# Run read-only, without capabilities, as user 10001 (deploy/compose/server.yaml, deploy/helm/fedrad-server).
# Pin PYTHON_IMAGE by digest in your registry: a tag can change under you.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fedrad
COPY requirements/cpu.lock requirements/cpu.lock
# One of the two privacy accountants needs torch; the CPU's build, from its own index only, is enough.
RUN /opt/fedrad/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0"
COPY pyproject.toml README.md ./
COPY common common
COPY server server
COPY deploy deploy
# The client's package is not in this image: the wheel is built without it.
RUN sed -i 's/packages = \["client", /packages = [/' pyproject.toml \
    && grep --invert-match --extended-regexp '^(torch|nvidia|triton)' requirements/cpu.lock > /tmp/constraints.txt \
    && /opt/fedrad/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt ".[server]" \
    && /opt/fedrad/bin/python -m compileall -q /opt/fedrad/lib

FROM ${PYTHON_IMAGE}
# Debian's own security updates come with each build, hence no pinned version of nginx.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx-light \
    && rm -rf /var/lib/apt/lists/* /var/log/nginx \
    && groupadd --gid 10001 fedrad \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/fedrad-server --shell /usr/sbin/nologin fedrad \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fedrad-server
COPY --from=build /opt/fedrad /opt/fedrad
ENV PATH=/opt/fedrad/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FEDRAD_SERVER_HOME=/var/lib/fedrad-server \
    HOME=/var/lib/fedrad-server \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /var/lib/fedrad-server
VOLUME ["/var/lib/fedrad-server"]
EXPOSE 8443
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-m", "deploy.docker.health", "tcp:127.0.0.1:9400", "tcp:127.0.0.1:8443"]
ENTRYPOINT ["fedrad-server"]
CMD ["up", "--home", "/var/lib/fedrad-server", "--listen", "0.0.0.0:8443"]
