# docker build -t tre-lightning .
# docker run --rm --gpus all -v tre-runs:/runs tre-lightning fit --config configs/countdown_tiny.yaml
#
# Any base with Python >= 3.11 and pip will do. This one brings torch with CUDA 13.0; on a bare one,
# pip fetches torch: --build-arg BASE_IMAGE=python:3.11-slim
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE_IMAGE}

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# The virtual environment sees the base's torch and pip, and leaves the base's own packages alone.
RUN python3 -m venv --system-site-packages --without-pip /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
WORKDIR /app

# Dependencies first: this layer is built again only when these two files change.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > /tmp/requirements.txt \
    && python -m pip install -c constraints.txt -r /tmp/requirements.txt hatchling \
    && rm /tmp/requirements.txt

COPY README.md LICENSE ./
COPY src src
RUN python -m pip install --no-deps --no-build-isolation .
COPY configs configs

# The configs write to runs/, relative to the working directory.
RUN useradd --create-home --uid 10001 tre \
    && install -d -o tre -g tre /runs \
    && ln -s /runs runs
USER tre
VOLUME /runs
ENTRYPOINT ["python", "-m", "tre_lightning"]
