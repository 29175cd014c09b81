# docker build -t tre_lightning .
# docker run --rm --gpus all -v "$PWD/runs:/app/runs" tre_lightning fit --config configs/countdown_tiny.yaml
#
# The base holds Python alone: torch and its CUDA libraries come from PyPI at the versions of
# constraints.txt, so what runs is what the tests ran on, and the driver is all that the host adds.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm
FROM ${BASE_IMAGE}

# Triton, which torch's CUDA build brings, compiles its launchers with the C compiler when it runs.
# Not pinned: Debian's mirrors drop a version when its next one comes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Any user may write to the volumes and the home, for `docker run --user`.
RUN useradd --no-create-home --home-dir /home/tre --uid 1000 tre \
    && install -d -m 1777 /home/tre /app/runs /cache
ENV HOME=/home/tre \
    USER=tre \
    HF_HOME=/cache/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/venv/bin:${PATH} \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app

# Dependencies first: a change of the source leaves this layer alone.
COPY pyproject.toml constraints.txt /tmp/build/
RUN python3 -m venv /opt/venv \
    && python -c 'import tomllib; d = tomllib.load(open("/tmp/build/pyproject.toml", "rb")); p = d["project"]; e = p["optional-dependencies"]; print(*d["build-system"]["requires"], *p["dependencies"], *e["lora"], *e["serve"], sep="\n")' > /tmp/build/requirements.txt \
    && python -m pip install -c /tmp/build/constraints.txt -r /tmp/build/requirements.txt

COPY pyproject.toml README.md LICENSE /tmp/build/
COPY src /tmp/build/src
RUN python -m pip install --no-deps --no-build-isolation /tmp/build \
    && rm -rf /tmp/build
# Readable by every user, whatever the umask of the checkout.
COPY --chmod=755 configs configs

ARG REVISION=unknown
LABEL org.opencontainers.image.title="tre_lightning" \
      org.opencontainers.image.description="Trust Region Entropy for reinforcement learning of language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"

USER 1000:1000
VOLUME ["/app/runs", "/cache"]
ENTRYPOINT ["python", "-m", "tre_lightning"]
CMD ["--help"]
