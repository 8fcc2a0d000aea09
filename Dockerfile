# docker build -t musicscope .                                  CPU
# docker build -t musicscope --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#   --build-arg PYTHON=python3.12 --build-arg TORCH_INDEX= .      CUDA; run with --gpus all
# docker run --rm -it -v "$PWD":/musicscope musicscope make report
ARG BASE=debian:bookworm-slim
FROM ${BASE}
ARG PYTHON=python3.11
# Index of torch's CPU build, or empty for the CUDA build that the package index has.
ARG TORCH_INDEX=""
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} PYTHON=${PYTHON} PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ${PYTHON} ${PYTHON}-venv git make ca-certificates chromium-driver \
    || DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ${PYTHON} ${PYTHON}-venv git make ca-certificates \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /musicscope
# Packages first: a change of code installs none of them again.
COPY requirements.lock requirements-nodeps.txt ./
RUN ${PYTHON} -m venv .venv \
    && .venv/bin/pip install -r requirements.lock \
    && .venv/bin/pip install --no-deps -r requirements-nodeps.txt
COPY . .
RUN make setup
ENV PATH=/musicscope/.venv/bin:$PATH
CMD ["musicscope", "--help"]
