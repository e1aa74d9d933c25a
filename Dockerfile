# syntax=docker/dockerfile:1
#
# docker build -t snake-lora .                                              CPU
# docker build -t snake-lora:cuda --build-arg DEVICE=cuda .                 NVIDIA GPU: docker run --gpus all
# docker run --rm -v "$PWD":/work snake-lora fit --config balanced.yaml --config quickstart.yaml
ARG PYTHON=3.12
ARG DEVICE=cpu

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /dist .

FROM python:${PYTHON}-slim AS packages
ARG DEVICE
# PyTorch's own index has builds without CUDA; the default one has those with it.
ARG PYTORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
COPY --from=wheel /dist /dist
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL="$PYTORCH_INDEX"; fi \
    && pip install /dist/*.whl

FROM python:${PYTHON}-slim AS runtime
ARG DEVICE
# Debian keeps no old versions to pin. Triton compiles the launchers of its kernels (model.compile_layers) with the system's compiler.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = cuda ]; then \
        apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
LABEL org.opencontainers.image.title="snake_lora_pl" \
      org.opencontainers.image.description="LoRA fine-tuning of language models that play Snake" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="0.2.0"
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SNAKE_LORA_PL_CACHE=/cache
RUN useradd --create-home --uid 1000 snake && mkdir /cache /work && chown snake:snake /cache /work
COPY --from=packages /opt/venv /opt/venv
USER 1000
WORKDIR /work
VOLUME ["/cache"]
ENTRYPOINT ["snake-lora"]
CMD ["--help"]
