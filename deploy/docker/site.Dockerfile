# syntax=docker/dockerfile:1
# A hospital's site: agent, link and relay, each as its own container of this one image.
# Build from the repository's root, for the CPU (default), for V100 cards, or for T4 and newer:
#   docker build -f deploy/docker/site.Dockerfile -t fedrad-site:cpu .
#   docker build -f deploy/docker/site.Dockerfile -t fedrad-site:volta \
#     --build-arg TORCH=volta --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker build -f deploy/docker/site.Dockerfile -t fedrad-site:cu130 \
#     --build-arg TORCH=cu130 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# CUDA 13 builds have no code for Volta: `fedrad-site doctor --gpu` says so before a round does.
# Run read-only, without capabilities, as users 10001 (site) and 10002 (relay).
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fedrad
COPY requirements/cpu.lock requirements/cpu.lock
# torch first, from its own index only, so that no other index can offer it
RUN /opt/fedrad/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch==2.13.0"
COPY pyproject.toml README.md ./
COPY common common
COPY client client
COPY deploy deploy
# The server's package is not in this image; what torch brought stays as it is.
RUN sed -i 's/"server", //' pyproject.toml \
    && grep --invert-match --extended-regexp '^(torch|nvidia|triton)' requirements/cpu.lock > /tmp/constraints.txt \
    && /opt/fedrad/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt ".[site,${TORCH}]" \
    && /opt/fedrad/bin/python -m compileall -q /opt/fedrad/lib

FROM ${PYTHON_IMAGE}
# Debian's own security updates come with each build, hence no pinned version of tesseract.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tesseract-ocr \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 fedrad \
    && groupadd --gid 10002 fedrad-relay \
    && useradd --uid 10001 --gid 10001 --groups 10002 --no-create-home --home-dir /var/lib/fedrad --shell /usr/sbin/nologin fedrad \
    && useradd --uid 10002 --gid 10002 --no-create-home --home-dir /var/lib/fedrad-relay --shell /usr/sbin/nologin fedrad-relay \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fedrad \
    && install --directory --owner=10001 --group=10002 --mode=2770 /var/lib/fedrad-relay \
    && install --directory --owner=10001 --group=10002 --mode=0750 /run/fedrad \
    && install --directory --owner=0 --group=0 --mode=0755 /srv/data /srv/base
COPY --from=build /opt/fedrad /opt/fedrad
ENV PATH=/opt/fedrad/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FEDRAD_SITE_HOME=/var/lib/fedrad \
    HOME=/tmp \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1
USER 10001:10001
WORKDIR /var/lib/fedrad
VOLUME ["/var/lib/fedrad", "/var/lib/fedrad-relay", "/run/fedrad"]
STOPSIGNAL SIGTERM
# This one is the agent's; link and relay bring their own (deploy/compose/site.yaml, deploy/helm/fedrad-site).
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-m", "deploy.docker.health", "unix:/run/fedrad/agent.sock"]
ENTRYPOINT ["fedrad-site"]
CMD ["agent", "--home", "/var/lib/fedrad", "--socket", "/run/fedrad/agent.sock", "--socket-group", "10002"]
